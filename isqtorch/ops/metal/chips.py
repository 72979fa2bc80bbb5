"""The kernel of `linear` for each chip and number of rows of x.

The limits are those at which MLX and ggml switch between kernels of the same kind on these chips (mlx/backend/metal,
quantized.cpp). The kernels of isqtorch have not been timed yet.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """The largest number of rows of x for each kernel."""

    gemv: int  # gemv.metal
    gemm: int  # gemm.metal; for more rows, torch multiplies with decoded weights


_BY_GENERATION = {
    1: Limits(gemv=4, gemm=512),
    2: Limits(gemv=4, gemm=512),
    3: Limits(gemv=4, gemm=1024),
    4: Limits(gemv=4, gemm=1024),
}
_OTHERS = Limits(gemv=4, gemm=1024)


@cache
def limits() -> Limits:
    """Return the limits for this machine's chip."""
    get_name = getattr(torch.backends.mps, "get_name", None)  # torch >= 2.13
    name = get_name() if get_name and torch.backends.mps.is_available() else ""
    generation = re.match(r"Apple M(\d+)", name)
    return _BY_GENERATION.get(int(generation[1]), _OTHERS) if generation else _BY_GENERATION[1]
