"""The formats: what the bytes of a quantized weight mean."""

from . import ggml, kquants, affine, hqq, fp8, mixes  # isort: skip  # in the order in which formats are listed
from .base import AUTO, Fields, Part, QuantFormat, formats, get_format, mix_name, register, resolve_format
from .mixes import MIXES, Mix

__all__ = [
    "AUTO",
    "MIXES",
    "Fields",
    "Mix",
    "Part",
    "QuantFormat",
    "formats",
    "get_format",
    "mix_name",
    "register",
    "resolve_format",
]

del affine, fp8, ggml, hqq, kquants, mixes  # imported so that they register; reached through get_format
