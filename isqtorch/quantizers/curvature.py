"""What errors of a few neighbouring columns cost, where the columns behind them make up for what they can.

With `H = V diag(d) V'` (see `feedback.py`) and columns S, this cost is `r C r'`, `C = V[S, S] diag(d[S]) V[S, S]'`, for the
errors r that remain after those before S are made up for. Error feedback and sweeps inside S need no more of H than C.

On a CPU, every sum is added in the order of columns, and torch works on one thread at a time (`denormals.py`). So the
numbers are those of the native kernel (csrc/cpu/quantize/curvature.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .denormals import blocks_per_chunk

_LARGEST = torch.finfo(torch.float32).max


def curvature(factor: Tensor) -> Tensor:
    """Compute C of some columns.

    Args:
        factor: the factor's rows and columns of S, `[s, s]`: V above the diagonal, d on it.

    Returns:
        f32 `[s, s]`, symmetric.
    """
    size = len(factor)
    v = factor.triu(1) + torch.eye(size, device=factor.device)
    scaled = v * factor.diagonal()
    if factor.device.type != "cpu":
        with torch.autocast(factor.device.type, enabled=False):
            total = scaled @ v.t()
    else:
        total = torch.zeros(size, size)
        for k in range(size):
            _add_product(total[: k + 1, : k + 1], scaled[: k + 1, k], v[: k + 1, k])
    return total.triu() + total.triu(1).t()


def best_order(c: Tensor) -> tuple[Tensor, Tensor] | None:
    """Choose the order in which columns are rounded, and factorize C in this order.

    What an error costs is d of its column. The product of all d is that of C, whatever the order, so their sum is small
    if they are alike. The last column cannot pass its error on, and its d is its diagonal element of C: the smallest is
    taken. Then the same again for the columns left.

    Args:
        c: f32 `[b, b]`.

    Returns:
        The columns in the order of rounding, int64 `[b]`; and V in this order, f32 `[b, b]`, unit upper triangular. None
        if C is not positive definite in f32.
    """
    size = len(c)
    rest, left = c.clone(), torch.ones(size, dtype=torch.bool, device=c.device)
    order = torch.empty(size, dtype=torch.int64, device=c.device)
    columns = torch.zeros_like(c)  # of V, with rows in the order of C
    for position in reversed(range(size)):
        diagonal = rest.diagonal()
        if not bool(((diagonal > 0) & (diagonal <= _LARGEST))[left].all()):
            return None
        smallest = diagonal.where(left, float("inf")).min()
        picked = int(((diagonal == smallest) & left).int().argmax())
        order[position] = picked
        left[picked] = False
        columns[:, position] = (rest[:, picked] / rest[picked, picked]).where(left, 0)
        _add_product(rest, -columns[:, position], rest[picked].clone())
        columns[picked, position] = 1
    return order, columns[order]


def couplings(c: Tensor) -> Tensor:
    """Divide each column of C by its diagonal element, and put 0 there: `[s, s]`.

    The best value of element j, given errors r of the others, is what it would be without them minus r times column j.
    """
    return (c / c.diagonal()).fill_diagonal_(0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the outer product of two vectors to a matrix, in place."""
    step = blocks_per_chunk(total.shape[1], total.device)
    for start in range(0, len(total), step):
        total[start : start + step] += left[start : start + step, None] * right
