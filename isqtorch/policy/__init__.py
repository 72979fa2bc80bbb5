"""Which weight gets which format, and why. Nothing here reads the value of a weight."""
