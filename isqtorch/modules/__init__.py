"""The modules a quantized model is made of."""

from .embedding import QuantEmbedding
from .experts import QuantExperts
from .linear import QuantLinear
from .packed import PackedModule

__all__ = ["PackedModule", "QuantEmbedding", "QuantExperts", "QuantLinear"]
