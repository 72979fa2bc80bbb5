"""Formats with a scale and a minimum in a block: q4_1 q5_1.

Codes divide the range from the smallest to the largest element evenly. With an importance vector, a search chooses
scale and minimum.
"""

from __future__ import annotations

import torch

from isqtorch.formats import Fields, QuantFormat

from .blocks import Blocks, importance_weight
from .rounding import divide, first_max, first_min, reciprocal
from .search import search_affine


def solve(fmt: QuantFormat, blocks: Blocks, rule: str | None) -> Fields:
    """Return scale `d`, minimum `m` and codes `q` of n blocks."""
    x = blocks.x.t().contiguous()  # [32, n]
    nmax = (1 << fmt.bits) - 1
    if blocks.importance is not None and blocks.row_power is not None:
        weight = importance_weight(x, blocks.importance.t(), blocks.row_power)
        d, minimum, q = search_affine(x, weight, nmax, -0.9, 0.05, 36)
        m = -minimum
    else:
        m = first_min(x)
        d = divide(first_max(x) - m, nmax)
        q = ((x - m) * reciprocal(d) + 0.5).int().clamp(max=nmax)  # .int() truncates
    return {"d": d.half(), "m": m.half(), "q": q.t().to(torch.uint8)}
