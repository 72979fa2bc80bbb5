"""Folders of MLX, as mlx-lm writes and reads them."""

from .checkpoint import MlxCheckpoint
from .settings import is_mlx

__all__ = ["MlxCheckpoint", "is_mlx"]
