"""Prompts for benchmarks of whole models."""

from __future__ import annotations

import numpy as np

from ..peers import Array


def tokens(vocabulary: int, count: int) -> Array:
    """int64 `[count]`: tokens at random, always the same."""
    return np.random.default_rng(0).integers(vocabulary, size=count)
