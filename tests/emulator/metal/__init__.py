"""Metal shaders on the CPU; README.md beside the emulator says how to use it."""
