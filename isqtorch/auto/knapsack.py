"""Multiple-choice knapsack: one option per item with the smallest total cost, and a total size within a budget.

Solved by dynamic programming over sizes, in steps. A step is the greatest common divisor of all size differences, so
for most models sizes are exact. If that gives too many steps, sizes are rounded up to larger steps. The total then
still stays within the budget, and the bytes lost by rounding are spent greedily.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import numpy as np

_STEPS = 1 << 15  # largest number of steps; time and memory grow with items times steps


class Option(NamedTuple):
    """One way to store one item."""

    size: int  # bytes
    cost: float


def solve(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of one option per item.

    Args:
        items: the options of each item, at least one each.
        budget: in the unit of the sizes; at least the sum of the smallest size of each item.

    Returns:
        Indices with the smallest total cost within the budget, except for the rounding of sizes described above. Of
        options with equal cost the smaller is chosen.
    """
    useful = [_useful(options) for options in items]
    spare = budget - sum(options[indices[0]].size for options, indices in zip(items, useful, strict=True))
    assert spare >= 0, "the budget is below the least"
    extra = [
        [options[i].size - options[indices[0]].size for i in indices]
        for options, indices in zip(items, useful, strict=True)
    ]
    most = sum(sizes[-1] for sizes in extra)
    if spare >= most:  # everything fits
        return [indices[-1] for indices in useful]
    step = gcd(*(size for sizes in extra for size in sizes))
    step *= -(-spare // (step * _STEPS)) or 1
    places = spare // step + 1
    best = np.zeros(places)  # smallest cost of the items so far, by available steps
    taken = np.zeros((len(items), places), dtype=np.uint8)
    for row, (options, indices, sizes) in enumerate(zip(items, useful, extra, strict=True)):
        new = best + options[indices[0]].cost
        for k, (i, size) in enumerate(zip(indices[1:], sizes[1:], strict=True), 1):
            steps = -(-size // step)
            if steps >= places:
                break
            candidate = best[: places - steps] + options[i].cost
            better = candidate < new[steps:]
            new[steps:][better] = candidate[better]
            taken[row, steps:][better] = k
        best = new
    at = places - 1
    chosen = [0] * len(items)
    for row in range(len(items) - 1, -1, -1):
        chosen[row] = int(taken[row, at])
        at -= -(-extra[row][chosen[row]] // step)
    left = spare - sum(sizes[k] for sizes, k in zip(extra, chosen, strict=True))
    _spend(items, useful, extra, chosen, left)
    return [indices[k] for indices, k in zip(useful, chosen, strict=True)]


def _useful(options: Sequence[Option]) -> list[int]:
    """Indices sorted by size, without options that cost as much as a smaller one or more."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].cost)):
        if not kept or options[i].cost < options[kept[-1]].cost:
            kept.append(i)
    return kept


def _spend(
    items: Sequence[Sequence[Option]],
    useful: Sequence[Sequence[int]],
    extra: Sequence[Sequence[int]],
    chosen: list[int],
    left: int,
) -> None:
    """Give items a larger option while one fits into the bytes left, largest gain first. Changes `chosen` in place."""
    while True:
        gains = [
            (items[row][useful[row][chosen[row]]].cost - items[row][useful[row][k]].cost, -row, k)
            for row in range(len(items))
            for k in range(chosen[row] + 1, len(useful[row]))
            if extra[row][k] - extra[row][chosen[row]] <= left
        ]
        if not gains:
            return
        _, negative_row, k = max(gains)
        left -= extra[-negative_row][k] - extra[-negative_row][chosen[-negative_row]]
        chosen[-negative_row] = k
