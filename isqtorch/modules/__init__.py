"""The modules that replace the layers of a quantized model."""

from .embedding import QuantEmbedding
from .experts import QuantExperts
from .linear import QuantLinear
from .packed import PackedModule

__all__ = ["PackedModule", "QuantEmbedding", "QuantExperts", "QuantLinear"]
