"""The quantizers choose integers and scales, in plain torch. Native kernels are tested against them.

There is one family per module; `families.py` lists them.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat

from .blocks import Blocks, row_mean_square
from .denormals import blocks_per_chunk, denormals_kept
from .families import Rule, check_rule, family_of, has_rule, needs_whole, scale_rule, uses_importance
from .feedback import feedback_factor, solve_feedback

__all__ = [
    "Rule",
    "check_rule",
    "feedback_factor",
    "has_rule",
    "needs_whole",
    "scale_rule",
    "solve",
    "solve_feedback",
    "uses_importance",
]


def solve(fmt: QuantFormat, w: Tensor, importance: Tensor | None = None, rule: str | None = None) -> Fields:
    """Quantize a matrix.

    The result does not depend on the process's flush-to-zero mode.

    Args:
        fmt: the format.
        w: f32 `[N, K]`, finite, K a multiple of `fmt.block`.
        importance: f32 `[K]`, >= 0, for all rows; or `[G, K]`, one vector for each of G equal runs of rows. Ignored
            if `uses_importance(fmt, rule)` is false.
        rule: name of an alternative rule of the family; None is the default.

    Returns:
        The fields of the `N * K / block` blocks, in row order. A 16-bit scale is not finite if the weights of its block
        are too large for it.

    Raises:
        ValueError: the family does not support `rule`.
    """
    check_rule(fmt, rule)
    family = family_of(fmt)
    rows, columns = w.shape
    x = w.reshape(rows * columns // fmt.block, fmt.block)
    per_row = columns // fmt.block
    if not uses_importance(fmt, rule):
        importance = None
    elif importance is not None:
        importance = importance.reshape(-1, fmt.block)  # [G * per_row, block]
        rows_per_vector = rows * per_row // max(1, importance.shape[0])

    with denormals_kept() if w.device.type == "cpu" else nullcontext():
        power = row_mean_square(w) if importance is not None and family.row_power else None
        chunk = max(1, x.shape[0]) if family.whole else blocks_per_chunk(fmt.block, w.device)
        done: list[Fields] = []
        for start in range(0, max(1, x.shape[0]), chunk):
            index = torch.arange(start, min(start + chunk, x.shape[0]), device=w.device)
            row = index // per_row
            weights = None
            if importance is not None:
                weights = importance[row // rows_per_vector * per_row + index % per_row]
            blocks = Blocks(x[start : start + chunk], weights, None if power is None else power[row])
            done.append(family.solve(fmt, blocks, rule))
    return {name: torch.cat([fields[name] for fields in done]) for name in done[0]}
