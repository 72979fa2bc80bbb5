"""What is measured: shapes, numbers of rows, and the numbers in the matrices. Only numpy, so that a peer's process can use it."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
"""(N, K) of Llama-3-8B: attention, gate and up, down."""

ROWS = [1, 2, 4, 8, 16, 32, 128, 512]
"""M: rows of x, tokens in one call."""

DRAM_BYTES = 1 << 30
"""Copies of a weight that together exceed this come from memory, not from a cache (some machines report 300 MB of L3)."""


def weight(n: int, k: int) -> Array:
    """f32 `[n, k]`, normally distributed like a layer's weights."""
    return np.random.default_rng(n * k).standard_normal((n, k), dtype=np.float32) * np.float32(0.02)


def activations(m: int, k: int) -> Array:
    """f32 `[m, k]`, with values that bf16 holds exactly, so that every library gets the same."""
    x = np.random.default_rng(m).standard_normal((m, k), dtype=np.float32)
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def importance(k: int) -> Array:
    """f32 `[k]`, like the mean squares of activations."""
    return np.random.default_rng(k).standard_exponential(k, dtype=np.float32) + np.float32(0.01)


def copies_for(nbytes: int, regime: str) -> int:
    """How many copies of a packed weight one measurement rotates through: "hot" means one."""
    return 1 if regime == "hot" else DRAM_BYTES // nbytes + 1


def relative_error(y: Array, exact: Array) -> float:
    """|y - exact| / |exact|; infinite if y has other numbers than finite ones."""
    if not np.isfinite(y).all():
        return float("inf")
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
