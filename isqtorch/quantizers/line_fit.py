"""The rule "search" of the affine and HQQ families: the line through a group's levels that costs least.

A group's weights are approximated by `value(level) = scale * level + offset`, both of 16 bits. The default rules take scale and
offset from the extremes of the group. Here sixteen ranges are tried, the group's own and ones cut off by up to 3/4 of a step
at either end; for the levels of each, the weighted least-squares line is rounded as it will be stored and judged by its
error with the levels that belong to it. The best one is refined twice in the same way. The default rule's line is a
candidate too, so no group gets worse.

An error counts `sqrt(m + x * x)`, m the group's mean square, times the importance of the column, if there is one: that is
ggml's measure, with the group for the row. Where nothing has any importance, the default rule's line stays.

Every tensor is f32 `[n, lanes]` or `[lanes]`: n elements of a group, lanes = groups. Sums run in index order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks, importance_weight
from .rounding import divide, first_max, first_min, ordered_sum, square_root

_CUTS = 4  # at either end
_CUT = 0.25  # of a step; multiples of it are exact in f32
_REFINEMENTS = 2


@dataclass(frozen=True)
class Line(ABC):
    """The lines of n groups, of two numbers each, rounded as they are stored: f32 `[lanes]`."""

    scale: Tensor
    second: Tensor  # bias or zero point

    @classmethod
    @abstractmethod
    def rounded(cls, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Line:
        """The line nearest to `scale * level + low` that two numbers of `dtype` can describe."""

    @abstractmethod
    def position(self, x: Tensor) -> Tensor:
        """Where x lies between the levels, `[n, lanes]`."""

    @abstractmethod
    def value(self, level: Tensor) -> Tensor:
        """The weights that levels stand for, with the roundings of the format's decoder."""


def error_weights(blocks: Blocks) -> Tensor:
    """What the squared error of each element counts, `[n, lanes]`."""
    x = blocks.x.t()
    power = divide(ordered_sum(x * x), x.shape[0])
    if blocks.importance is None:
        return square_root(power + x * x)
    return importance_weight(x, blocks.importance.t(), power)


def fit_lines(
    x: Tensor, weight: Tensor, nmax: int, line: Line, codes: Tensor, dtype: torch.dtype
) -> tuple[Line, Tensor]:
    """Search for better lines than those given.

    Args:
        x: `[n, lanes]`.
        weight: `[n, lanes]`, not negative.
        nmax: levels run from 0 to nmax.
        line, codes: the default rule's lines, and its codes uint8 `[n, lanes]`.
        dtype: of the two numbers of a line.

    Returns:
        lines and codes of the same shapes, the given ones in lanes where nothing better was found.
    """

    def error(line: Line, level: Tensor) -> Tensor:
        off = line.value(level) - x
        return ordered_sum((weight * off) * off)

    def levels(position: Tensor) -> Tensor:
        return position.clamp(0, nmax).round()  # half to even

    weighted = weight * x
    sum_w, sum_x = ordered_sum(torch.stack([weight, weighted], dim=1))
    best, least = line, error(line, codes.float())
    improved = torch.zeros_like(least, dtype=torch.bool)

    def attempt(position: Tensor) -> None:
        nonlocal best, least, improved
        level = levels(position)
        wl = weight * level
        sum_l, sum_l2, sum_xl = ordered_sum(torch.stack([wl, wl * level, wl * x], dim=1))
        det = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / det
        low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        found = line.rounded(scale, low, dtype)
        new = error(found, levels(found.position(x)))
        better = (det > 0) & (new < least)  # false where a number is not finite
        least = torch.where(better, new, least)
        scale, second = torch.where(better, found.scale, best.scale), torch.where(better, found.second, best.second)
        best, improved = type(line)(scale, second), improved | better

    low, high = first_min(x), first_max(x)
    span = high - low
    step = divide(span, nmax)
    for below in range(_CUTS):
        for above in range(_CUTS):
            start = low + step * (_CUT * below)
            inverse = divide(nmax, span - step * (_CUT * (below + above)))
            attempt((x - start) * inverse)
    for _ in range(_REFINEMENTS):
        attempt(best.position(x))
    return best, torch.where(improved, levels(best.position(x)).to(torch.uint8), codes)
