"""ggml's searches for the scale (and minimum) of a sub-block, one sub-block per lane.

Every tensor is f32 `[n, lanes]` or `[lanes]`: n elements of a sub-block, lanes = sub-blocks. Each lane runs the scalar
algorithm: sums in index order, the first of equal candidates wins, branches become `torch.where`. Codes are int32
`[n, lanes]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import divide, f32, first_extreme, first_max, first_min, nearest_int, ordered_sum

_TINY = 1e-15  # a sub-block whose elements are all smaller than this is treated as zero


def search_symmetric(x: Tensor, nmax: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find scale and codes of `x ~ scale * (code - nmax)` (ggml's make_qx_quants, rmse type 1).

    Try 19 scales around `-max / nmax`, each improved by a weighted least-squares fit to its codes.

    Args:
        x: `[n, lanes]`.
        nmax: codes run from 0 to 2 * nmax - 1.
        weight: `[n, lanes]`, not negative; by default x * x.

    Returns:
        scale `[lanes]`, codes `[n, lanes]`.
    """
    amax, peak = first_extreme(x)
    weight = x * x if weight is None else weight
    weighted = weight * x

    def fit(numerator: float) -> tuple[Tensor, Tensor, Tensor]:
        codes = nearest_int(divide(numerator, peak) * x).clamp(-nmax, nmax - 1)
        level = codes.float()
        sumlx, suml2 = ordered_sum(torch.stack([weighted * level, (weight * level) * level], dim=1))
        return codes, sumlx, suml2

    codes, sumlx, suml2 = fit(-nmax)
    scale = torch.where(suml2 != 0, sumlx / suml2, 0.0)
    best = scale * sumlx
    for step in (*range(-9, 0), *range(1, 10)):
        candidate, sumlx, suml2 = fit(-f32(nmax + f32(f32(0.1) * step)))
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        codes = torch.where(better, candidate, codes)
        scale = torch.where(better, sumlx / suml2, scale)
        best = torch.where(better, scale * sumlx, best)
    tiny = amax < _TINY
    return torch.where(tiny, 0.0, scale), torch.where(tiny, 0, codes + nmax)


def _sweep(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    sumlx: Tensor,
    suml2: Tensor,
    *,
    low: int | None,
    high: int,
    both_positive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run up to five rounds of coordinate descent: move one code at a time to its best value for the current scale.

    Args:
        x, weight: `[n, lanes]`.
        codes: the codes to start from, `[n, lanes]`.
        sumlx, suml2: sums of weight * x * code and of weight * code * code, `[lanes]`.
        low, high: range of the codes. If `low` is None, a negative code is stored as a byte and wraps, as in ggml.
        both_positive: require that the denominator without the element is positive, before the move, instead of the
            denominator after the move. The two functions of ggml differ in this.

    Returns:
        codes, sumlx, suml2 after the sweeps.
    """
    weighted = weight * x
    level = list(codes.float().unbind(0))
    active = torch.ones_like(sumlx, dtype=torch.bool)
    for _ in range(5):
        moved = torch.zeros_like(active)
        for i in range(len(level)):
            slx = sumlx - weighted[i] * level[i]
            sl2 = suml2 - (weight[i] * level[i]) * level[i]
            new = nearest_int(divide(x[i] * sl2, slx)).clamp(low, high)
            value = new.float()
            go = active & (slx > 0) & (value != level[i])
            if both_positive:
                go = go & (sl2 > 0)
            slx = slx + weighted[i] * value
            sl2 = sl2 + (weight[i] * value) * value
            go = go & ((slx * slx) * suml2 > (sumlx * sumlx) * sl2)
            if not both_positive:
                go = go & (sl2 > 0)
            stored = value if low is not None else (new & 0xFF).float()
            level[i] = torch.where(go, stored, level[i])
            sumlx = torch.where(go, slx, sumlx)
            suml2 = torch.where(go, sl2, suml2)
            moved = moved | go
        active = moved
        if not bool(active.any()):
            break
    return torch.stack(level).int(), sumlx, suml2


def search_q3(x: Tensor, nmax: int = 4) -> tuple[Tensor, Tensor]:
    """Find scale and codes of `x ~ scale * (code - nmax)` by coordinate descent (ggml's make_q3_quants with rmse).

    Args:
        x: `[n, lanes]`; the weight of a squared error is x * x.
        nmax: codes run from 0 to 2 * nmax - 1.

    Returns:
        scale `[lanes]`, codes `[n, lanes]`.
    """
    amax, peak = first_extreme(x)
    weight = x * x
    codes = nearest_int(divide(-nmax, peak) * x).clamp(-nmax, nmax - 1)
    level = codes.float()
    sumlx, suml2 = ordered_sum(torch.stack([(weight * x) * level, (weight * level) * level], dim=1))
    codes, sumlx, suml2 = _sweep(x, weight, codes, sumlx, suml2, low=-nmax, high=nmax - 1, both_positive=False)
    scale = torch.where(suml2 > 0, sumlx / suml2, 0.0)
    tiny = amax < _TINY
    return torch.where(tiny, 0.0, scale), torch.where(tiny, 0, codes + nmax)


def search_affine(
    x: Tensor, weight: Tensor, nmax: int, rmin: float, rdelta: float, nstep: int, *, absolute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Find scale, minimum and codes of `x ~ scale * code - minimum` (ggml's make_qkx2_quants and make_qkx3_quants).

    Try `nstep + 1` scales. For the codes of each one, compute the weighted least-squares scale and minimum. A step
    starts from the minimum of the best candidate so far, not from the minimum of the data.

    Args:
        x: `[n, lanes]`.
        weight: `[n, lanes]`, not negative.
        nmax: codes run from 0 to nmax.
        rmin, rdelta: step s divides the range into `nmax + rmin + rdelta * s` parts.
        nstep: number of the last step.
        absolute: compare candidates by |error| instead of its square.

    Returns:
        scale `[lanes]`, minimum `[lanes]` (>= 0, because it is subtracted), codes `[n, lanes]`.
    """
    low, high = first_min(x), first_max(x)
    weighted = weight * x
    sum_w, sum_x = ordered_sum(torch.stack([weight, weighted], dim=1), start=None)
    start = low = torch.where(low > 0, 0.0, low)
    flat = high <= low

    def encode(numerator: float, low: Tensor) -> tuple[Tensor, Tensor]:
        iscale = divide(numerator, high - low)
        return iscale, nearest_int(iscale * (x - low)).clamp(0, nmax)

    def error(scale: Tensor, low: Tensor, level: Tensor) -> Tensor:
        diff = ((scale * level) + low) - x
        return ordered_sum(weight * (diff.abs() if absolute else diff * diff))

    iscale, codes = encode(nmax, low)
    scale = divide(1.0, iscale)
    best = error(scale, low, codes.float())
    for step in range(nstep + 1):
        _, candidate = encode(f32(f32(f32(rmin) + f32(f32(rdelta) * step)) + nmax), low)
        level = candidate.float()
        wl = weight * level
        sum_l, sum_l2, sum_xl = ordered_sum(torch.stack([wl, wl * level, wl * x], dim=1))
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        positive = new_low > 0
        new_scale = torch.where(positive, sum_xl / sum_l2, new_scale)
        new_low = torch.where(positive, 0.0, new_low)
        new_error = error(new_scale, new_low, level)
        better = (det > 0) & (new_error < best)
        codes = torch.where(better, candidate, codes)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
        best = torch.where(better, new_error, best)
    # a flat lane was divided by 0: its results are meaningless
    return torch.where(flat, 0.0, scale), -torch.where(flat, start, low), torch.where(flat, 0, codes)


def search_positive(x: Tensor, weight: Tensor, nmax: int) -> tuple[Tensor, Tensor]:
    """Find scale and codes of `x ~ scale * code`, where x are the scales of sub-blocks (ggml's make_qp_quants).

    Args:
        x: `[n, lanes]`, not negative.
        weight: `[n, lanes]`, not negative.
        nmax: codes run from 0 to nmax.

    Returns:
        scale `[lanes]`, codes `[n, lanes]`, as bytes (0 .. 255).
    """
    peak = first_max(x).clamp(min=0.0)

    def error(iscale: Tensor, codes: Tensor) -> Tensor:
        diff = x - divide(1.0, iscale) * codes.float()
        return ordered_sum((weight * diff) * diff)

    iscale = divide(nmax, peak)
    best = error(iscale, nearest_int(iscale * x))
    for step in (*range(-4, 0), *range(1, 5)):
        candidate = divide(f32(f32(f32(0.1) * step) + nmax), peak)
        new_error = error(candidate, nearest_int(candidate * x).clamp(max=nmax))
        better = new_error < best
        iscale = torch.where(better, candidate, iscale)
        best = torch.where(better, new_error, best)

    codes = nearest_int(iscale * x).clamp(max=nmax)
    level = codes.float()
    sumlx, suml2 = ordered_sum(torch.stack([(weight * x) * level, (weight * level) * level], dim=1))
    codes, sumlx, suml2 = _sweep(x, weight, codes, sumlx, suml2, low=None, high=nmax, both_positive=True)
    scale = torch.where(suml2 > 0, sumlx / suml2, 0.0)
    tiny = peak < _TINY
    return torch.where(tiny, 0.0, scale), torch.where(tiny, 0, codes & 0xFF)
