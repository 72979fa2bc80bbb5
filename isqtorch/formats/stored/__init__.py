"""Weights that other programs have quantized, as transformers checkpoints store them. `base.py` explains."""

from .base import Header, Kept, StoredFiles, StoredMethod, StoredWeight
from .methods import method_of

__all__ = ["Header", "Kept", "StoredFiles", "StoredMethod", "StoredWeight", "method_of"]
