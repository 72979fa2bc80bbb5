"""The input of a solver: blocks of weights, with their importance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import divide, square_root


@dataclass(frozen=True)
class Blocks:
    """n blocks of a weight matrix, in row order."""

    x: Tensor  # f32 [n, block]
    importance: Tensor | None = None  # f32 [n, block], >= 0
    row_power: Tensor | None = None  # f32 [n], mean of w * w over the whole row that a block comes from
    steps: int | None = None  # how many steps the whole matrix takes, if these are not all of its blocks


def importance_weight(x: Tensor, importance: Tensor, power: Tensor) -> Tensor:
    """Compute ggml's weights of the squared errors: `importance * sqrt(power + x * x)`, element by element."""
    return importance * square_root(power + x * x)


def row_mean_square(w: Tensor) -> Tensor:
    """Return the mean of w * w over each row, summed from column 0 up: f32 `[N, K]` -> `[N]`."""
    total = torch.zeros_like(w[:, 0])
    for column in w.unbind(1):
        total += column * column
    return divide(total, w.shape[1])
