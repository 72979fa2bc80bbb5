"""The quantizers choose integers and scales, in plain torch. Native kernels are tested against them.

There is one family per module; a format names its family in `solver`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat

from . import absmax, affine, codebook, fp8, hqq, kquants, minmax
from .blocks import Blocks, row_mean_square
from .denormals import blocks_per_chunk, denormals_kept

__all__ = ["Rule", "check_rule", "has_rule", "needs_whole", "solve", "uses_importance"]

Rule = Literal["search", "mlx"]
"""Alternatives to the default way of choosing the codes. A family supports both, one or none of them."""


@dataclass(frozen=True)
class _Solver:
    solve: Callable[[QuantFormat, Blocks, str | None], Fields]
    rules: tuple[str, ...] = ()  # alternatives to the default rule
    row_power: bool = False  # an importance vector is combined with the mean square of the whole row
    whole: bool = False  # needs all blocks at once


_SOLVERS = {
    "absmax": _Solver(absmax.solve, row_power=True),
    "minmax": _Solver(minmax.solve, row_power=True),
    "kquants": _Solver(kquants.solve),
    "codebook": _Solver(codebook.solve),
    "affine": _Solver(affine.solve, rules=("mlx", "search")),
    "hqq": _Solver(hqq.solve, rules=("search",), whole=True),
    "fp8": _Solver(fp8.solve),
}


def has_rule(fmt: QuantFormat, rule: str | None) -> bool:
    """Return whether the format's family supports `rule`. All families support None, the default."""
    return rule is None or rule in _SOLVERS[fmt.solver].rules


def uses_importance(fmt: QuantFormat, rule: str | None) -> bool:
    """Return whether an importance vector changes the result of `rule`: only searches use one."""
    return fmt.takes_importance or rule == "search"


def needs_whole(fmt: QuantFormat) -> bool:
    """Return whether the quantizer needs a whole matrix at once: HQQ stops by the error of all blocks."""
    return _SOLVERS[fmt.solver].whole


def check_rule(fmt: QuantFormat, rule: str | None) -> None:
    """Raise ValueError unless the format's family supports `rule`."""
    if not has_rule(fmt, rule):
        rules = _SOLVERS[fmt.solver].rules
        known = " or ".join(["None", *map(repr, rules)])
        raise ValueError(f"quantize: {fmt.name} has no rule {rule!r}. Use rule={known}.")


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
    solver = _SOLVERS[fmt.solver]
    rows, columns = w.shape
    x = w.reshape(rows * columns // fmt.block, fmt.block)
    per_row = columns // fmt.block
    if not uses_importance(fmt, rule):
        importance = None
    elif importance is not None:
        importance = importance.reshape(-1, fmt.block)  # [G * per_row, block]
        rows_per_vector = rows * per_row // max(1, importance.shape[0])

    with denormals_kept() if w.device.type == "cpu" else nullcontext():
        power = row_mean_square(w) if importance is not None and solver.row_power else None
        chunk = max(1, x.shape[0]) if solver.whole else blocks_per_chunk(fmt.block, w.device)
        done: list[Fields] = []
        for start in range(0, max(1, x.shape[0]), chunk):
            index = torch.arange(start, min(start + chunk, x.shape[0]), device=w.device)
            row = index // per_row
            weights = None
            if importance is not None:
                weights = importance[row // rows_per_vector * per_row + index % per_row]
            blocks = Blocks(x[start : start + chunk], weights, None if power is None else power[row])
            done.append(solver.solve(fmt, blocks, rule))
    return {name: torch.cat([fields[name] for fields in done]) for name in done[0]}
