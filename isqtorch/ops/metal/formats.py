"""Which struct of csrc/metal/formats stands for which format. A new format of this backend is one line here."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...formats import get_format
from ...formats.affine import AffineFormat
from ...formats.hqq import HqqFormat


class Struct(NamedTuple):
    """A format as the shaders know it."""

    header: str  # below csrc/
    name: str
    unit: int  # weights that a lane takes at a time
    quantizes: bool  # csrc/metal/kernels/quantize.metal knows its default rule


_GGML32, _KQUANTS = "metal/formats/ggml32.h", "metal/formats/kquants.h"
_NAMED = {
    "q4_0": Struct(_GGML32, "Q4_0", 16, True),
    "q4_1": Struct(_GGML32, "Q4_1", 16, True),
    "q5_0": Struct(_GGML32, "Q5_0", 16, True),
    "q5_1": Struct(_GGML32, "Q5_1", 16, True),
    "q8_0": Struct(_GGML32, "Q8_0", 16, True),
    "q8_1": Struct(_GGML32, "Q8_1", 16, True),
    "q2k": Struct(_KQUANTS, "Q2K", 32, False),
    "q3k": Struct(_KQUANTS, "Q3K", 32, False),
    "q4k": Struct(_KQUANTS, "Q4K", 32, False),
    "q5k": Struct(_KQUANTS, "Q5K", 32, False),
    "q6k": Struct(_KQUANTS, "Q6K", 32, False),
    "q8k": Struct(_KQUANTS, "Q8K", 16, False),
    "fp8": Struct("metal/formats/fp8.h", "Fp8", 16, True),
}


def struct_of(name: str) -> Struct:
    """The struct of a format, by canonical name."""
    if name in _NAMED:
        return _NAMED[name]
    fmt = get_format(name)
    if isinstance(fmt, AffineFormat):
        header = "scale_bias_f16" if fmt.scale_dtype == torch.float16 else "scale_bias_bf16"
    else:
        assert isinstance(fmt, HqqFormat), f"{name} has no Metal struct"
        header = "scale_zero_f16"
    struct = f"Stream<{fmt.bits}, {fmt.block}, Header::{header}>"
    return Struct("metal/formats/stream.h", struct, 16, isinstance(fmt, AffineFormat))
