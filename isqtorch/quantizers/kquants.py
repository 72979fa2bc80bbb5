"""ggml's K-quants: a search per sub-block, integer scales for the super-block, then codes for the stored scales.

Shapes in this file: `[e, n * s]` elements by sub-blocks, `[s, n]` sub-blocks by super-blocks, `[n, ...]` as stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat

from .blocks import Blocks, importance_weight
from .rounding import divide, first_extreme, first_max, nearest_int, ordered_sum, square_root
from .search import search_affine, search_positive, search_q3, search_symmetric

_TINY = 1e-15


def solve(fmt: QuantFormat, blocks: Blocks, rule: str | None) -> Fields:
    """Return the fields of n super-blocks; formats/kquants.py lists them."""
    sub_block = 32 if fmt.bits in (4, 5) else 16
    x = _lanes(blocks.x, sub_block)
    weight = None
    if blocks.importance is not None:
        weight = _lanes(blocks.importance, sub_block)
        if fmt.bits != 6:
            weight = importance_weight(x, weight, _power(blocks.x, sub_block, twice=fmt.bits != 2))
    if fmt.bits == 3:
        return _q3k(x, weight)
    if fmt.bits == 6:
        return _q6k(x, weight)
    return _scale_and_min(fmt.bits, x, weight)


def _lanes(blocks: Tensor, sub_block: int) -> Tensor:
    """`[n, 256]` -> `[sub_block, n * s]`: one lane per sub-block."""
    return blocks.reshape(-1, sub_block).t().contiguous()


def _by_super_block(lanes: Tensor, s: int) -> Tensor:
    """`[n * s]` -> `[s, n]`: one lane per super-block."""
    return lanes.view(-1, s).t().contiguous()


def _codes(q: Tensor, s: int) -> Tensor:
    """int32 `[e, n * s]` -> uint8 `[n, 256]`."""
    return q.t().reshape(-1, s * q.shape[0]).to(torch.uint8)


def _power(blocks: Tensor, sub_block: int, twice: bool) -> Tensor:
    """Return the mean of x * x (or twice the mean) of the super-block, for each sub-block: `[n, 256]` -> `[n * s]`."""
    total = ordered_sum((blocks * blocks).t())
    power = divide(2.0 * total if twice else total, 256.0)
    return power.repeat_interleave(256 // sub_block)


def _scale_and_min(bits: int, x: Tensor, weight: Tensor | None) -> Fields:
    """q2k, q4k, q5k."""
    s = 256 // x.shape[0]
    nmax = (1 << bits) - 1
    scale_max = 15 if bits == 2 else 63
    if weight is not None:
        scale, minimum, q = search_affine(x, weight, nmax, -0.9, 0.05, 36)
        total = _by_super_block(ordered_sum(weight), s)
        d, sc = search_positive(_by_super_block(scale, s), total, scale_max)
        dmin, mn = search_positive(_by_super_block(minimum, s), total, scale_max)
    else:
        if bits == 2:
            scale, minimum, q = search_affine(x, x.abs(), nmax, -0.5, 0.1, 15, absolute=True)
        else:
            spread = square_root(divide(ordered_sum(x * x), 32.0)) + x.abs()
            rmin, nstep = (-1.0, 20) if bits == 4 else (-0.5, 15)
            scale, minimum, q = search_affine(x, spread, nmax, rmin, 0.1, nstep)
        d, sc = _integer_scales(_by_super_block(scale, s), scale_max)
        dmin, mn = _integer_scales(_by_super_block(minimum, s), scale_max)

    d, dmin = d.half(), dmin.half()
    if bits == 2:  # ggml packs sc | mn << 4 without masking: the upper bits of sc are OR-ed into mn
        mn = (mn << 4 | sc) >> 4 & 15
        sc = sc & 15
    else:
        sc, mn = sc.clamp(max=63), mn.clamp(max=63)
    step = (d.float() * sc.float()).t().reshape(-1)  # [n * s]
    offset = (dmin.float() * mn.float()).t().reshape(-1)
    again = nearest_int(divide(x + offset, step)).clamp(0, nmax)
    q = torch.where(step != 0, again, q)
    return {"d": d, "dmin": dmin, "sc": sc.t().to(torch.uint8), "mn": mn.t().to(torch.uint8), "q": _codes(q, s)}


def _integer_scales(values: Tensor, scale_max: int) -> tuple[Tensor, Tensor]:
    """Scale `values` >= 0, `[s, n]`, to integers. Return the super-scale `[n]` and the integers 0 .. 255 `[s, n]`."""
    peak = first_max(values)
    live = peak > 0
    inverse = torch.where(live, divide(scale_max, peak), 0.0)
    integers = nearest_int(inverse * values) & 0xFF
    return torch.where(live, divide(peak, scale_max), 0.0), torch.where(live, integers, 0)


def _q3k(x: Tensor, weight: Tensor | None) -> Fields:
    if weight is not None:
        scale, q = search_symmetric(x, 4, weight)
        d, sc = search_symmetric(_by_super_block(scale, 16), 32, _by_super_block(ordered_sum(weight), 16))
    else:
        scale, q = search_q3(x)
        scales = _by_super_block(scale, 16)
        _, peak = first_extreme(scales)
        iscale = divide(-32.0, peak)
        live = peak != 0
        sc = torch.where(live, nearest_int(iscale * scales).to(torch.int8).int().clamp(-32, 31) + 32, 0)
        d = torch.where(live, divide(1.0, iscale), 0.0)
    d = d.half()
    step = (d.float() * (sc - 32).float()).t().reshape(-1)
    again = nearest_int(divide(x, step)).clamp(-4, 3) + 4
    q = torch.where(step != 0, again, q)
    return {"d": d, "sc": sc.t().to(torch.uint8), "q": _codes(q, 16)}


def _q6k(x: Tensor, weight: Tensor | None) -> Fields:
    scale, q = search_symmetric(x, 32, weight)
    scales = _by_super_block(scale, 16)
    amax, peak = first_extreme(scales)
    live = amax >= _TINY
    iscale = divide(-128.0, peak)
    d = torch.where(live, divide(1.0, iscale), 0.0).half()
    sc = torch.where(live, nearest_int(iscale * scales).clamp(max=127), 0)
    step = (d.float() * sc.float()).t().reshape(-1)
    again = nearest_int(divide(x, step)).clamp(-32, 31) + 32
    q = torch.where(step != 0, again, q)
    q = torch.where(live.repeat_interleave(16), q, 0)  # all bytes of a zero block are zero
    return {"d": d, "sc": sc.t().to(torch.int8), "q": _codes(q, 16)}
