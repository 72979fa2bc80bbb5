"""Checkpoints that other programs write and read: GGUF files and MLX folders."""
