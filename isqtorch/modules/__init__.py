"""The modules a quantized model is made of."""

from .embedding import QuantEmbedding
from .linear import QuantLinear
from .packed import PackedModule

__all__ = ["PackedModule", "QuantEmbedding", "QuantLinear"]
