"""The formats: what the bytes of a quantized weight mean."""

from . import ggml, kquants, codebook, affine, hqq, fp8  # isort: skip  # in the order in which formats are listed
from .base import Fields, Part, QuantFormat, formats, get_format, mix_name, register
from .choices import AUTO, KEEP, SLACK, Spec, number_of_bits, repacked_as, resolve_format

__all__ = [
    "AUTO",
    "KEEP",
    "SLACK",
    "Fields",
    "Part",
    "QuantFormat",
    "Spec",
    "formats",
    "get_format",
    "mix_name",
    "number_of_bits",
    "register",
    "repacked_as",
    "resolve_format",
]

del affine, codebook, fp8, ggml, hqq, kquants  # imported so that they register; reached through get_format
