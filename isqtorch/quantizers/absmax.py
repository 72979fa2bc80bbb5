"""Symmetric formats with one scale in a block: q4_0 q5_0 q8_0 q8_1 q8k.

The scale maps the element of largest magnitude to the end of the code range; with an importance vector (4 and 5 bits)
a search chooses the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat

from .blocks import Blocks, importance_weight
from .rounding import divide, first_extreme, nearest_int, reciprocal, round_half_away
from .search import search_symmetric


def solve(fmt: QuantFormat, blocks: Blocks, rule: str | None) -> Fields:
    """Return the fields of n blocks: `d`, `q`, for q8_1 also `s`, for q8k also `bsums`."""
    x = blocks.x.t().contiguous()  # [block, n]
    if fmt.bits < 8:
        return _offset_codes(x, 1 << (fmt.bits - 1), blocks)
    return _q8k(x) if fmt.block == 256 else _int8(x, with_sum=fmt.name == "q8_1")


def _offset_codes(x: Tensor, nmax: int, blocks: Blocks) -> Fields:
    """q4_0, q5_0: codes 0 .. 2 * nmax - 1 stand for -nmax .. nmax - 1.

    The sign of the scale is chosen so that the element of largest magnitude gets -nmax.
    """
    if blocks.importance is not None and blocks.row_power is not None:
        weight = importance_weight(x, blocks.importance.t(), blocks.row_power)
        d, q = search_symmetric(x, nmax, weight)
    else:
        _, peak = first_extreme(x)
        d = divide(peak, -nmax)
        q = (x * reciprocal(d) + (nmax + 0.5)).int().clamp(max=2 * nmax - 1)  # .int() truncates
    return {"d": d.half(), "q": q.t().to(torch.uint8)}


def _int8(x: Tensor, with_sum: bool) -> Fields:
    """q8_0, q8_1: |code| <= 127."""
    amax, _ = first_extreme(x)
    d = divide(amax, 127.0)
    q = round_half_away(x * reciprocal(d)).to(torch.int8)
    fields = {"d": d.half(), "q": q.t()}
    if with_sum:
        fields["s"] = (d * q.sum(dim=0).float()).half()
    return fields


def _q8k(x: Tensor) -> Fields:
    """q8k: the element of largest magnitude gets code -127, so d has the opposite sign; d stays f32."""
    _, peak = first_extreme(x)
    iscale = divide(-127.0, peak)
    live = iscale.isfinite()
    q = torch.where(live, nearest_int(iscale * x).clamp(max=127), 0)
    d = torch.where(live, divide(1.0, iscale), 0.0)
    bsums = q.view(16, 16, -1).sum(dim=1)  # [16, n]
    return {"d": d, "q": q.t().to(torch.int8), "bsums": bsums.t().to(torch.int16)}
