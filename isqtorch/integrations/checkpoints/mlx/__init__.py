"""Folders of MLX, as mlx-lm writes and reads them."""
