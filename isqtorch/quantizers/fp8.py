"""FP8: one f32 scale per block, codes rounded to the nearest e4m3fn value."""

from __future__ import annotations

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat
from isqtorch.formats.fp8 import E4M3_MAX

from .blocks import Blocks
from .rounding import divide

_SMALLEST_SCALE = 2.0**-126  # the smallest normal f32: kernels may flush subnormal scales to zero


def encode_e4m3(x: Tensor) -> Tensor:
    """Round f32 to the nearest e4m3fn value, ties to even, saturating at +-448, and return the bits. NaN becomes 0x7F.

    Args:
        x: f32, any shape.

    Returns:
        uint8, same shape.
    """
    magnitude = x.abs().clamp(max=E4M3_MAX)
    bits = magnitude.view(torch.int32)
    rounded = (bits + 0x7FFFF + (bits >> 20 & 1)) >> 20  # keep 3 of 23 mantissa bits
    normal = rounded - (120 << 3)  # exponent bias 127 -> 7
    subnormal = (magnitude * 512.0).round().int()  # multiples of 2**-9; 8 of them are the first normal value
    code = torch.where(magnitude < 2.0**-6, subnormal, normal) | (x.view(torch.int32) >> 24 & 0x80)
    return torch.where(x.isnan(), 0x7F, code).to(torch.uint8)


def solve(fmt: QuantFormat, blocks: Blocks, rule: str | None) -> Fields:
    """Return scale and codes of n blocks: scale = max |w| / 448 (1 for zero blocks), code = e4m3(clamp(w / scale))."""
    amax = blocks.x.abs().amax(dim=1)
    scale = divide(amax, E4M3_MAX).clamp(min=_SMALLEST_SCALE)
    scale = torch.where(amax == 0, 1.0, scale)
    return {"scale": scale, "q": encode_e4m3(blocks.x / scale[:, None])}
