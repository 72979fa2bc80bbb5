"""Notice weights of which packing has lost much more than it usually does.

A format with 16-bit scales cannot hold small steps: weights of 1e-5 become zeros in q6k. So a sample of blocks of every
weight is decoded after packing. If too many of them are far from their weights, the whole weight is measured.

How far is usual? `QuantFormat.weight_error` bounds the error of normally distributed weights, relative to their RMS.
But the steps of a block grow with its largest weight, and outliers make it large. So the largest weight counts too:
that of a normally distributed block is about `_peak` times the RMS. Measured so, the error of sparse, heavy-tailed or
shifted weights is at most 1.2 times the bound in every format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat

_LIMIT = 2.5  # a multiple of the usual error that is damage
_ALL = 0.9  # a relative error that is damage in every format: the weights may as well be zeros
_LOST = 0.25  # a block with a larger relative error is lost, if it is damaged
_SHARE = 1 / 32  # a share of lost blocks that is damage, though the errors are small beside the largest weights
_LEAST, _MOST = 4096, 32768  # weights in the sample, which else is 1/64 of the weights
_TOGETHER = 1 << 21  # number of weights that wait to be looked at together
_CHUNK = 1 << 17  # number of weights decoded at a time


@dataclass(frozen=True)
class Damage:
    """What packing lost of one matrix.

    Attributes:
        error: RMS error relative to the RMS of the weights.
        share: share of the blocks with too large an error; blocks of zeros do not count.
        expert: number of the matrix in a stack; None if there is only one.
    """

    error: float
    share: float
    expert: int | None = None


class _Packed(NamedTuple):
    """A matrix that has just been packed."""

    weight: Tensor  # float [N, K]
    packed: Tensor  # uint8 [N, row_bytes]
    fmt: QuantFormat
    importance: Tensor | None  # f32 [K], if it was used
    expert: int | None
    damages: list[Damage]  # where to put what is found


class Watch:
    """Looks at the matrices that were packed. Small ones wait and are looked at together, which is much faster."""

    def __init__(self) -> None:
        self._waiting: list[_Packed] = []
        self._size = 0

    def add(
        self,
        weight: Tensor,
        packed: Tensor,
        fmt: QuantFormat,
        damages: list[Damage],
        importance: Tensor | None = None,
        expert: int | None = None,
    ) -> None:
        """Look at a matrix, now or later.

        Args:
            weight: float `[N, K]`. It is held until it is looked at; a large one is not held.
            packed: its packed form, uint8 `[N, row_bytes]`.
            fmt: the format.
            damages: a list to which its damage is appended, if there is any.
            importance: see `damage`.
            expert: see `damage`.
        """
        if not weight.numel():
            return
        self._waiting.append(_Packed(weight, packed, fmt, importance, expert, damages))
        self._size += weight.numel()
        if self._size >= _TOGETHER:
            self.finish()

    def finish(self) -> None:
        """Look at all matrices that wait."""
        waiting, self._waiting, self._size = self._waiting, [], 0
        alike: dict[object, list[_Packed]] = {}
        for entry in waiting:
            alike.setdefault((entry.fmt.name, entry.weight.dtype, entry.weight.device), []).append(entry)
        for group in alike.values():
            for entry in _with_far_blocks(group):
                found = damage(entry.weight, entry.packed, entry.fmt, entry.importance, entry.expert)
                if found is not None:
                    entry.damages.append(found)


def damage(
    weight: Tensor, packed: Tensor, fmt: QuantFormat, importance: Tensor | None = None, expert: int | None = None
) -> Damage | None:
    """Whether packing lost much more of a matrix than it usually does.

    Args:
        weight: float `[N, K]`, not empty.
        packed: its packed form, uint8 `[N, row_bytes]`.
        fmt: the format.
        importance: f32 `[K]` if it was used. A matrix is then damaged only if its error is too large by both measures,
            with the importance of the columns and without. The search may give up columns that do not count.
        expert: for the result.

    Returns:
        The exact error, or None if there is no damage, or none in the sample.
    """
    rows, blocks = _sample(weight, packed, fmt)
    if not _measured(rows, blocks, fmt, torch.ones(fmt.block, dtype=torch.float64)).damaged(0.5):
        return None
    ones = torch.ones(weight.shape[1], dtype=torch.float64)
    measures = [ones] if importance is None else [ones, importance.detach().cpu().double().sqrt()]
    step = max(1, _CHUNK // weight.shape[1])
    found: list[_Measured] = []
    for measure in measures:
        total = _Measured(0, 0, 0, 0, 0)
        for start in range(0, weight.shape[0], step):
            part = slice(start, start + step)
            total = total.plus(_measured(weight[part], packed[part], fmt, measure))
        found.append(total)
    if not all(total.damaged() for total in found):
        return None
    return Damage(found[0].relative, found[0].share, expert)


class _Measured(NamedTuple):
    """Sums over blocks."""

    error: float  # squares of the error
    size: float  # squares of the weights
    limit: float  # squares of the error that begins to be damage
    lost: float  # number of lost blocks
    blocks: float  # number of blocks that are not zero

    def plus(self, other: _Measured) -> _Measured:
        return _Measured._make(a + b for a, b in zip(self, other, strict=True))

    def damaged(self, part: float = 1.0) -> bool:
        """Whether this is damage, or at least `part` of what is."""
        return self.error > part * self.limit or self.share >= part * _SHARE

    @property
    def share(self) -> float:
        return self.lost / max(1, self.blocks)

    @property
    def relative(self) -> float:
        """RMS of the error relative to that of the weights."""
        return math.sqrt(self.error / self.size) if self.size else math.inf


def _measured(weight: Tensor, packed: Tensor, fmt: QuantFormat, measure: Tensor) -> _Measured:
    """Compare rows or blocks with their packed form. The error of each column is multiplied by `measure`."""
    exact = weight.cpu().double()
    off = _decoded(packed, fmt).view_as(exact) - exact
    error, size, unit = (_norms(x * measure, fmt) for x in (off, exact, torch.ones_like(exact)))
    peak = exact.reshape(-1, fmt.block).abs().amax(dim=1) / _peak(fmt)
    far = _LIMIT * fmt.weight_error * torch.maximum(size, peak * unit)
    limit = torch.minimum(far, _ALL * size)
    lost = error > torch.minimum(torch.maximum(far, _LOST * size), _ALL * size)
    sums = (error.square().sum(), size.square().sum(), limit.square().sum(), lost.sum(), (size > 0).sum())
    return _Measured._make(map(float, sums))


def _with_far_blocks(group: list[_Packed]) -> list[_Packed]:
    """The matrices of one format, type and device that have a block in their sample which may be damaged.

    Every matrix is looked at here, so this takes few operations, in f32. The largest weight of a block does not count
    yet, and a block whose squares are zero in f32 may be damaged.
    """
    fmt = group[0].fmt
    samples = [_sample(entry.weight, entry.packed, fmt) for entry in group]
    exact = torch.cat([rows for rows, _ in samples]).float()
    off = torch.ops.isqtorch.dequantize(torch.cat([blocks for _, blocks in samples]), fmt.name, torch.float32).sub_(
        exact
    )
    limit = torch.linalg.vector_norm(exact, dim=1).mul_(min(_LIMIT * fmt.weight_error, _ALL))
    far = ~(torch.linalg.vector_norm(off, dim=1) < limit)
    if not bool(far.any()):
        return []
    parts = far.split([len(rows) for rows, _ in samples])
    return [entry for entry, part in zip(group, parts, strict=True) if bool(part.any())]


def damage_reason(damages: Sequence[Damage], fmt: QuantFormat) -> str:
    """What packing lost of a weight, for the report.

    Args:
        damages: the damaged matrices of the weight, at least one.
        fmt: its format.
    """
    worst = max(damages, key=lambda matrix: matrix.error)
    experts = sorted({matrix.expert for matrix in damages if matrix.expert is not None})
    listed = ", ".join(map(str, experts[:3])) + (f" and {len(experts) - 3} more" if len(experts) > 3 else "")
    where = f" in expert{'s' * (len(experts) > 1)} {listed}" if experts else ""
    share = max(matrix.share for matrix in damages)
    return (
        f"damaged{where}: error {_percent(worst.error)}, usually {_percent(fmt.weight_error)}; {_percent(share)} of the blocks "
        "are lost"
    )


def damage_alarms(reasons: Mapping[str, str], op: str) -> list[str]:
    """The warning about damaged layers, or nothing if there are none.

    Args:
        reasons: for each damaged layer, with its format in parentheses, its `damage_reason`.
        op: the operation, for the message.
    """
    if not reasons:
        return []
    first = "; ".join(f"{name} is {reason}" for name, reason in list(reasons.items())[:3])
    more = f"; and {len(reasons) - 3} more, `damaged` in the report" if len(reasons) > 3 else ""
    return [
        f"{op}: {len(reasons)} layer{'s' * (len(reasons) > 1)} lost much more than usual: {first}{more}. Most likely the weights "
        "are too small for the 16-bit scales of the format. Give these layers a format with 32-bit scales (fp8, q8k), exclude "
        "them, or scale their weights."
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def _sample(weight: Tensor, packed: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Some blocks, as weights `[blocks, block]` and as bytes `[blocks, block_bytes]`."""
    in_row, size = weight.shape[1] // fmt.block, fmt.block_bytes
    every = _every(weight.numel(), in_row)
    count = -(-weight.numel() // (fmt.block * every))
    blocks = packed.contiguous().as_strided((count, size), (size * every, 1))
    if weight.is_contiguous():
        return weight.as_strided((count, fmt.block), (fmt.block * every, 1)), blocks
    at = torch.arange(0, count * every, every, device=weight.device)
    columns = torch.arange(fmt.block, device=weight.device) + (at % in_row * fmt.block)[:, None]
    return weight[(at // in_row)[:, None], columns], blocks


@cache
def _every(weights: int, in_row: int) -> int:
    """The distance of the blocks of a sample, in blocks.

    It has no common divisor with the number of blocks in a row, nor with 30. So the sample runs through all columns,
    and meets rows that differ in a regular way, such as every second one.
    """
    every = max(1, weights // min(max(_LEAST, weights // 64), _MOST))
    while math.gcd(every, 30 * in_row) > 1:
        every -= 1
    return every


def _decoded(packed: Tensor, fmt: QuantFormat) -> Tensor:
    """The weights of packed rows or blocks, f64 on the CPU: squares of the smallest f32 numbers are zero in f32."""
    decoded: Tensor = torch.ops.isqtorch.dequantize(packed, fmt.name, torch.float32)
    return decoded.cpu().double()


def _norms(x: Tensor, fmt: QuantFormat) -> Tensor:
    """The norm of each block of `[rows, K]`."""
    norms: Tensor = torch.linalg.vector_norm(x.reshape(-1, fmt.block), dim=1)
    return norms


def _peak(fmt: QuantFormat) -> float:
    """About the largest of `block` normally distributed weights, relative to their RMS."""
    return 0.86 * math.sqrt(2 * math.log(fmt.block))
