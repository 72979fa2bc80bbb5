"""Formats with a table of levels: iq4_nl and iq4_xs by a search for the scale, mxfp4 by the exponent of the largest weight.

Shapes in this file: `[32, n * s]` elements by sub-blocks, `[s, n]` sub-blocks by super-blocks, `[n, ...]` as stored.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat
from isqtorch.formats.codebook import E2M1_LEVELS, IQ4_LEVELS, power_of_two

from .blocks import Blocks, importance_weight
from .rounding import divide, first_extreme, nearest_int, ordered_sum, reciprocal

_TINY = 1e-15  # a sub-block whose elements are all smaller than this is treated as zero
_TRIES = 7  # the search tries 2 * _TRIES + 1 scales


def solve(fmt: QuantFormat, blocks: Blocks, rule: str | None) -> Fields:
    """Return the fields of n blocks; formats/codebook.py lists them."""
    x = blocks.x.reshape(-1, 32).t().contiguous()  # [32, n * s]
    if fmt.name == "mxfp4":
        return _mxfp4(x)
    weight = x * x
    if blocks.importance is not None:
        power = ordered_sum((blocks.x * blocks.x).t()) * (2.0 / fmt.block)
        power = power.repeat_interleave(fmt.block // 32)
        weight = importance_weight(x, blocks.importance.reshape(-1, 32).t(), power)
    scale = _search(x, weight)
    if fmt.block == 32:
        return {"d": scale.half(), "q": _nearest(x * reciprocal(scale)).t()}
    scales = scale.view(-1, 8).t()  # [8, n]
    _, peak = first_extreme(scales)
    d = divide(-peak, 32.0)
    sc = nearest_int(reciprocal(d) * scales).clamp(-32, 31)
    step = (d * sc.float()).t().reshape(-1)  # [n * 8]; ggml takes the d that is not rounded to f16
    q = _nearest(reciprocal(step) * x)
    return {"d": d.half(), "sc": sc.t().to(torch.int8), "q": q.t().reshape(-1, 256)}


def _nearest(scaled: Tensor) -> Tensor:
    """Return the number of the nearest level of iq4 as uint8; the upper one of two that are equally near."""
    middles = [(low + high) / 2 for low, high in itertools.pairwise(IQ4_LEVELS)]
    boundaries = torch.tensor(middles, dtype=torch.float32, device=scaled.device)
    return torch.bucketize(scaled, boundaries, right=True, out_int32=True).to(torch.uint8)


def _search(x: Tensor, weight: Tensor) -> Tensor:
    """Find the scale of `x ~ scale * level` for every sub-block (the search in ggml's quantize_row_iq4_nl_impl).

    The first try maps the element of largest magnitude to 127; the others map it to -120 .. -134. Each is improved by a
    weighted least-squares fit to its levels.

    Args:
        x: `[32, lanes]`.
        weight: `[32, lanes]`, not negative.

    Returns:
        scale `[lanes]`.
    """
    amax, peak = first_extreme(x)
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=x.device)

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
        level = levels[_nearest(inverse * x).int()]
        weighted = weight * level
        sumlx, suml2 = ordered_sum(torch.stack([weighted * x, weighted * level], dim=1))
        return sumlx, suml2

    sumlx, suml2 = fit(divide(1.0, divide(-peak, float(IQ4_LEVELS[0]))))
    scale = torch.where(suml2 > 0, sumlx / suml2, 0.0)
    best = scale * sumlx
    for step in range(-_TRIES, _TRIES + 1):
        sumlx, suml2 = fit(divide(float(step + IQ4_LEVELS[0]), peak))
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        scale = torch.where(better, sumlx / suml2, scale)
        best = torch.where(better, scale * sumlx, best)
    return torch.where(amax < _TINY, 0.0, scale)


def _mxfp4(x: Tensor) -> Fields:
    """The scale puts the largest magnitude between 8 and 16 of its steps; codes are the nearest, the smaller of two."""
    e = _exponent(x.abs().amax(dim=0))
    step = power_of_two(e)
    magnitude = torch.zeros_like(x, dtype=torch.uint8)
    for low, high in itertools.pairwise(E2M1_LEVELS[:8]):
        magnitude += x.abs() > step * ((low + high) / 2)
    sign = (x < 0) & (magnitude > 0)  # zero has no sign: ggml takes the first of the two codes
    return {"e": e, "q": (magnitude | sign.to(torch.uint8) << 3).t()}


def _exponent(amax: Tensor) -> Tensor:
    """Return floor(log2(amax)) - 2 + 127 as uint8, with log2 rounded to f32 as in ggml; 0 if that is negative.

    Just below a power of two, the rounded logarithm is that of the power. Its distance there is
    1 / ln 2 units of the mantissa, and the spacing of f32 numbers near the logarithm decides. In integers, because no two
    systems have the same log2. (ggml stores the low byte of a negative number; but such a block is zero in any case.)
    """
    bits = amax.view(torch.int32)
    above = (bits >> 23) - 126  # the power of two above amax
    units = 0x800000 - (bits & 0x7FFFFF)  # of the mantissa, up to it
    n = torch.where(above > 0, above - 1, -above)
    spacing = (n.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # the power of two that is not above n
    rounds_up = units.float() <= 0.6931472 * spacing
    exponent = above + 124 + rounds_up.int()
    return torch.where(amax > 0, exponent, 0).clamp(min=0).to(torch.uint8)
