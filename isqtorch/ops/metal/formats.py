"""The struct of csrc/metal/formats for each format."""

from __future__ import annotations

from typing import NamedTuple

import torch

from isqtorch.formats import QuantFormat, get_format
from isqtorch.formats.affine import AffineFormat
from isqtorch.formats.codebook import CodebookFormat
from isqtorch.formats.fp8 import Fp8Format
from isqtorch.formats.hqq import HqqFormat


class Struct(NamedTuple):
    """The Metal struct of a format."""

    header: str  # path below csrc/
    name: str
    unit: int  # weights that a lane decodes at a time
    quantizes: bool  # csrc/metal/kernels/quantize.metal implements the format's default rule


_GGML32, _KQUANTS, _FP8 = "metal/formats/ggml32.h", "metal/formats/kquants.h", "metal/formats/fp8.h"
_CODEBOOK = "metal/formats/codebook.h"


def struct_of(name: str) -> Struct:
    """Return the struct of a format, by canonical name. Structs of ggml's formats have the name in capitals."""
    fmt = get_format(name)
    if isinstance(fmt, AffineFormat):
        return _stream(fmt, "scale_bias_f16" if fmt.scale_dtype == torch.float16 else "scale_bias_bf16", True)
    if isinstance(fmt, HqqFormat):
        return _stream(fmt, "scale_zero_f16", False)
    if isinstance(fmt, Fp8Format):
        return Struct(_FP8, "Fp8", 16, True)
    if isinstance(fmt, CodebookFormat):
        return Struct(_CODEBOOK, name.upper(), 16 if fmt.block == 32 else 32, name == "mxfp4")
    if fmt.block == 32:
        return Struct(_GGML32, name.upper(), 16, True)
    assert fmt.block == 256, f"{name} has no Metal struct"
    return Struct(_KQUANTS, name.upper(), 16 if fmt.bits == 8 else 32, False)


def _stream(fmt: QuantFormat, header: str, quantizes: bool) -> Struct:
    return Struct("metal/formats/stream.h", f"Stream<{fmt.bits}, {fmt.block}, Header::{header}>", 16, quantizes)
