"""How much each input column of a layer matters: importance matrices, their files, and calibration."""
