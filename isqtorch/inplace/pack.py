"""Pack one weight: its description, the packing, and the error of the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat
from isqtorch.policy.options import Options
from isqtorch.text import cause

from .damage import Damage, Watch
from .feedback import Feedback

_ERROR_CHUNK = 1 << 17  # number of weights that relative_error decodes at a time


@dataclass(frozen=True)
class Job:
    """One weight to pack, with the names of all layers that share it."""

    names: tuple[str, ...]
    has_input: bool  # at least one layer is not an embedding, so importance can be known
    fmt: QuantFormat
    importance: Tensor | None  # f32 [K], or [E, K] for a stack of experts
    rule: str | None  # the requested rule, if the format has it; with feedback, the rule for the scales
    device: torch.device | None  # None: stays on its device
    options: Options
    feedback: Feedback | None = None  # packs the matrix, if there is importance
    watch: Watch = field(default_factory=Watch, compare=False)  # looks at what `pack_weight` has packed
    damages: list[Damage] = field(default_factory=list, compare=False)  # what it found, when it is finished


@contextmanager
def naming_memory(op: str, layer: str, doing: str, state: str) -> Iterator[None]:
    """Raise an error about memory that ran out again, of the same class, with the layer and the way out.

    Args:
        op: the public function, for the message.
        layer: name of the layer that the block works on.
        doing: what the block does with it: "packed in q4k".
        state: sentences about what was done so far, and what the user can do.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kind = next((kind for kind in (torch.OutOfMemoryError, MemoryError) if isinstance(error, kind)), RuntimeError)
        if kind is RuntimeError and "can't allocate memory" not in str(error):  # torch has no class for it on the CPU
            raise
        told = str(error).partition("\n")[0]
        raise kind(
            f"{op}: {layer}: memory ran out while it was {doing}. {state}{f' ({told})' if told else ''}"
        ) from error


def pack_weight(
    weight: Tensor,
    job: Job,
    importance: Tensor | None = None,
    expert: int | None = None,
    columns: slice = slice(None),
) -> Tensor:
    """The packed form of a weight, on the weight's device. The job's watch looks at it afterwards.

    Args:
        weight: float `[N, K]` or `[E, N, K]`, any strides.
        job: format, rule and importance.
        importance: f32 `[K]` or `[E, K]`, used instead of the job's if `weight` is only a part of the job's weight.
        expert: number of the matrix, if `weight` is one of the job's stack.
        columns: the columns of the job's weight that `weight` has.

    Returns:
        uint8 `[N, row_bytes]` or `[E, N, row_bytes]`.

    Raises:
        ValueError: as the operator `quantize`; for a stack the message names the expert.
    """
    importance = job.importance if importance is None else importance
    if importance is not None:
        importance = importance.to(weight.device)
    if weight.dim() == 2:
        return _pack_matrix(weight, job, importance, expert, columns)
    experts, rows, width = weight.shape
    out = weight.new_empty((experts, rows, job.fmt.row_bytes(width)), dtype=torch.uint8)
    for number in range(experts):  # matrix by matrix, so that only one matrix of a transposed stack is copied at a time
        vector = importance[number] if importance is not None and importance.dim() == 2 else importance
        try:
            out[number] = _pack_matrix(weight[number], job, vector, number, columns)
        except ValueError as error:
            raise ValueError(f"expert {number}: {error}") from None
    return out


def _pack_matrix(weight: Tensor, job: Job, importance: Tensor | None, expert: int | None, columns: slice) -> Tensor:
    packed: Tensor
    try:
        if job.feedback is not None and importance is not None:
            # Errors that make up for each other are large by themselves, so the watch looks at the other packed form.
            packed, watched = job.feedback.pack(weight, job.fmt, importance, expert, columns)
        else:
            packed = watched = torch.ops.isqtorch.quantize(weight, job.fmt.name, importance, job.rule)
    except ValueError as error:  # the callers name the operation and the layer; the operator would name itself
        raise ValueError(cause(error)) from None
    job.watch.add(weight, watched, job.fmt, job.damages, importance, expert)
    return packed


def relative_error(weight: Tensor, packed: Tensor, fmt: QuantFormat) -> float:
    """RMS of (decoded - weight) over RMS of weight, for `[.., N, K]` and `[.., N, row_bytes]`, a few rows at a time."""
    difference = total = 0.0
    step = max(1, _ERROR_CHUNK // weight.shape[-1])
    for matrix, bytes_ in zip(weight, packed, strict=True) if weight.dim() == 3 else [(weight, packed)]:
        for start in range(0, matrix.shape[0], step):
            rows = matrix[start : start + step].float()
            decoded = torch.ops.isqtorch.dequantize(bytes_[start : start + step], fmt.name, torch.float32)
            difference += (decoded - rows).double().square().sum().item()
            total += rows.double().square().sum().item()
    return float((difference / total) ** 0.5) if total else 0.0
