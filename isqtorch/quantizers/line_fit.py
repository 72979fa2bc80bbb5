"""The rule "search" of the affine and HQQ families: fit a line to the levels of each group.

The weights of a group are approximated by `value(level) = scale * level + offset`, with 16-bit scale and offset. The
default rules take both from the extremes of the group. The search tries sixteen ranges: the group's own, and ranges
that are up to 3/4 of a step shorter at either end. For the levels of each range it computes the weighted least-squares
line, rounds it as it will be stored, computes new levels for this line, and compares the error. The best line is
refined twice in the same way. The default rule's line is a candidate too, so the error of a group never grows.

The weight of a squared error is `sqrt(m + x * x)`, where m is the mean square of the group, times the importance of the
column if there is one. This is ggml's measure, with the group instead of the row. If all importance is zero, the
default rule's line is kept.

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
    """One line per group: two numbers, f32 `[lanes]`, with values that can be stored exactly."""

    scale: Tensor
    second: Tensor  # bias or zero point

    @classmethod
    @abstractmethod
    def rounded(cls, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Line:
        """Return the line `scale * level + low`, with its two numbers rounded to `dtype`."""

    @abstractmethod
    def position(self, x: Tensor) -> Tensor:
        """Return the level of x as a real number, `[n, lanes]`."""

    @abstractmethod
    def value(self, level: Tensor) -> Tensor:
        """Return the weights of levels `[n, lanes]`, rounded as the format's decoder does."""


def error_weights(blocks: Blocks) -> Tensor:
    """Return the weight of each element's squared error, `[n, lanes]`."""
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
        dtype: type in which the two numbers of a line are stored.

    Returns:
        Lines and codes of the same shapes. Lanes without a better line keep the given one.
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
        better = (det > 0) & (new < least)  # false if a number is not finite
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
