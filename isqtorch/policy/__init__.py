"""Decide which weight gets which format, and why. This room never reads the values of a weight."""
