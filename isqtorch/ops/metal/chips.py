"""Which way `linear` takes on which chip, by the number of rows of x.

The numbers are those at which MLX's and ggml's kernels of the same kind change over on these chips (mlx/backend/metal,
quantized.cpp); nobody has timed ours yet.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """Rows of x up to which a kernel is the fastest way."""

    gemv: int  # gemv.metal
    gemm: int  # gemm.metal; more rows are multiplied with decoded weights by torch


_BY_GENERATION = {
    1: Limits(gemv=4, gemm=512),
    2: Limits(gemv=4, gemm=512),
    3: Limits(gemv=4, gemm=1024),
    4: Limits(gemv=4, gemm=1024),
}
_OTHERS = Limits(gemv=4, gemm=1024)


@cache
def limits() -> Limits:
    """Those of this machine's chip."""
    get_name = getattr(torch.backends.mps, "get_name", None)  # torch >= 2.13
    name = get_name() if get_name and torch.backends.mps.is_available() else ""
    generation = re.match(r"Apple M(\d+)", name)
    return _BY_GENERATION.get(int(generation[1]), _OTHERS) if generation else _BY_GENERATION[1]
