"""Arithmetic that must round exactly as scalar C code does.

The results of ggml's search quantizers are reproduced bit for bit. So every product, sum and quotient is one IEEE f32
operation, in the order of the original. Four properties of torch would break this; these helpers avoid them:

- `tensor.sum()` does not add in index order                          -> `ordered_sum`
- `scalar / tensor` is computed as a reciprocal and a product;
  so is `tensor / scalar` on a GPU                                    -> `divide`
- `torch.sqrt` in f32 may be off by one unit in the last place        -> `square_root`
- converting a float outside the integer range is undefined           -> `nearest_int`
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
    """Round as C's roundf, exactly. (`trunc(x + 0.5)` is wrong: it rounds 0.49999997 to 1.)"""
    whole = x.trunc()
    return torch.where((x - whole).abs() >= 0.5, whole + x.sign(), whole)


def divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """Return a / b, correctly rounded. One of the two may be a Python number."""
    if not isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        a = torch.full_like(b, a)
    if not isinstance(b, Tensor):
        b = torch.full_like(a, b)
    return a / b


def reciprocal(x: Tensor) -> Tensor:
    """Return 1 / x, or 0 where x is 0 or where 1 / x overflows (undefined in ggml)."""
    r = divide(1.0, x)
    return torch.where(r.isfinite(), r, 0.0)


def square_root(x: Tensor) -> Tensor:
    """Return the correctly rounded f32 square root, computed in f64. MPS has no f64; its own f32 root is used there."""
    return x.sqrt() if x.device.type == "mps" else x.double().sqrt().float()


def f32(value: float) -> float:
    """Round a Python number to f32. Sums and products of `f32` values are Python numbers and need rounding again."""
    return float(np.float32(value))


def scale_to_16_bits(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale to f16 or bf16. A result that is a subnormal f16 number is rounded away from zero.

    Subnormal numbers are coarse: a scale rounded towards zero would clip a large part of the group's range.
    """
    stored = scale.to(dtype)
    if dtype == torch.float16:
        short = (stored.float().abs() < scale.abs()) & (scale.abs() < 2.0**-14)
        stored = torch.where(short, (stored.view(torch.int16) + 1).view(torch.float16), stored)
    return stored


def ordered_sum(terms: Tensor, start: float | None = 0.0) -> Tensor:
    """Sum over the first dimension, from index 0 up: f32 `[n, ...]` -> `[...]`.

    Args:
        terms: the terms.
        start: initial value of the sum. None starts with element 0, which keeps the sign of a zero.
    """
    first, *rest = terms.unbind(0)
    total = first.clone() if start is None else first + start
    for term in rest:
        total += term
    return total


def first_extreme(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return per lane max |x| and the first element of this magnitude: `[n, lanes]` -> two `[lanes]`.

    If all elements of a lane are zero, the second result is +0.
    """
    magnitude = x.abs()
    index = magnitude.argmax(dim=0, keepdim=True)  # torch documents that this is the first one
    amax = magnitude.gather(0, index)[0]
    return amax, torch.where(amax > 0, x.gather(0, index)[0], 0.0)


def first_min(x: Tensor) -> Tensor:
    """Return per lane the first of the smallest elements (a zero keeps its sign): `[n, lanes]` -> `[lanes]`."""
    return x.gather(0, x.argmin(dim=0, keepdim=True))[0]


def first_max(x: Tensor) -> Tensor:
    """Return per lane the first of the largest elements: `[n, lanes]` -> `[lanes]`."""
    return x.gather(0, x.argmax(dim=0, keepdim=True))[0]
