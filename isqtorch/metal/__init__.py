"""Metal: shaders for Apple's GPUs, compiled by torch on first use."""
