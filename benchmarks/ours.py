"""Our own products as contenders, and torch's, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isqtorch import get_format, ops

from .timing import Spent, spend

ROUNDING = 2**-8  # of a bf16 result


class Here:
    """A function of this process as a contender, with the number of threads it runs with."""

    def __init__(self, call: Callable[[], object], *, threads: int = 1) -> None:
        self._call, self._threads = call, threads

    def run(self, calls: int) -> Spent:
        torch.set_num_threads(self._threads)
        return spend(self._call, calls)


def rotation(packed: Tensor, arena: Tensor) -> list[Tensor]:
    """Copies of `packed` side by side in `arena`, as many as fit."""
    count = arena.numel() // packed.numel()
    copies = arena[: count * packed.numel()].view(count, *packed.shape)
    copies.copy_(packed.expand_as(copies))
    return list(copies)


def check_linear(x: Tensor, packed: Tensor, fmt: str) -> None:
    """A kernel that computes something else is not worth timing; AssertionError with the error."""
    some = slice(0, 256)  # rows of the weight; each is computed as all others are
    exact = x.double() @ ops.dequantize(packed[some], fmt, torch.float32).double().t()
    error = float((ops.linear(x, packed, fmt)[..., some].double() - exact).norm() / exact.norm())
    allowed = get_format(fmt).linear_error + ROUNDING
    assert error < allowed, f"linear of {fmt}, {len(x)} rows, is off by {error:.2g}; {allowed:.2g} is allowed"


def linear_call(x: Tensor, copies: list[Tensor], fmt: str) -> Callable[[], Tensor]:
    """`ops.linear` with the next copy of the weight at each call."""
    turn = 0

    def call() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(copies)
        y: Tensor = ops.linear(x, copies[turn], fmt)
        return y

    return call
