"""Importance matrices (how much the error in each input column of a layer matters), their files, and calibration."""
