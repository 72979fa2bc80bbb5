"""Arithmetic that must round exactly as scalar C code does.

The search quantizers are reproduced bit for bit, so every product, sum and quotient here is one IEEE f32 operation,
in the order of the original. Four habits of torch would break that, and these helpers avoid them:

- `tensor.sum()` adds in an order of its own                          -> `ordered_sum`
- `scalar / tensor` is a reciprocal and a product, and so is
  `tensor / scalar` on a GPU                                           -> `divide`
- `torch.sqrt` in f32 may be off by one unit in the last place        -> `square_root`
- converting a float beyond the integer range is undefined            -> `nearest_int`
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of the mantissa


def nearest_int(x: Tensor) -> Tensor:
    """Round f32 to int32, half to even, the way ggml does: outside +-2**22 it wraps instead of saturating."""
    return ((x + _MAGIC).view(torch.int32) & 0x7FFFFF) - 0x400000


def round_half_away(x: Tensor) -> Tensor:
    """C's roundf. Exact: `trunc(x + 0.5)` would turn 0.49999997 into 1."""
    whole = x.trunc()
    return torch.where((x - whole).abs() >= 0.5, whole + x.sign(), whole)


def divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b, correctly rounded; one of the two may be a number."""
    if not isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        a = torch.full_like(b, a)
    if not isinstance(b, Tensor):
        b = torch.full_like(a, b)
    return a / b


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, but 0 where x is 0, and where it is so small that 1 / x overflows (ggml leaves the latter undefined)."""
    r = divide(1.0, x)
    return torch.where(r.isfinite(), r, 0.0)


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded f32 square root, through f64 (Metal has no f64, and its f32 root is what it is)."""
    return x.sqrt() if x.device.type == "mps" else x.double().sqrt().float()


def f32(value: float) -> float:
    """A Python number rounded to f32; sums of `f32` values and their products with small integers need rounding again."""
    return float(np.float32(value))


def ordered_sum(terms: Tensor, start: float | None = 0.0) -> Tensor:
    """Sum over the first dimension from index 0 up: f32 `[n, ...]` -> `[...]`.

    Args:
        start: what the sum begins with; None begins with element 0 itself, which keeps the sign of a zero.
    """
    first, *rest = terms.unbind(0)
    total = first.clone() if start is None else first + start
    for term in rest:
        total += term
    return total


def first_extreme(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per lane, the largest |x| and the first element that has it (+0 if all are zero): `[n, lanes]` -> two `[lanes]`."""
    magnitude = x.abs()
    index = magnitude.argmax(dim=0, keepdim=True)  # documented to be the first one
    amax = magnitude.gather(0, index)[0]
    return amax, torch.where(amax > 0, x.gather(0, index)[0], 0.0)


def first_min(x: Tensor) -> Tensor:
    """Per lane, the first of the smallest elements (a zero keeps its sign): `[n, lanes]` -> `[lanes]`."""
    return x.gather(0, x.argmin(dim=0, keepdim=True))[0]


def first_max(x: Tensor) -> Tensor:
    """Per lane, the first of the largest elements: `[n, lanes]` -> `[lanes]`."""
    return x.gather(0, x.argmax(dim=0, keepdim=True))[0]
