"""Packing one weight: what has to be known of it, how it is done, and the error that it leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat
from isqtorch.policy.options import Options

_ERROR_CHUNK = 1 << 17  # weights compared at a time by measure_error


@dataclass(frozen=True)
class Job:
    """One weight to pack, under all the names that share it."""

    names: tuple[str, ...]
    has_input: bool  # one of them is not an embedding, so that columns can matter
    fmt: QuantFormat
    importance: Tensor | None  # f32 [K], or [E, K] for a stack of experts
    rule: str | None  # the rule that was asked for, if the format has it
    device: torch.device | None  # None: where it is
    options: Options


def pack_weight(weight: Tensor, job: Job, importance: Tensor | None = None) -> Tensor:
    """The packed form of a weight, on the weight's device.

    Args:
        weight: float `[N, K]` or `[E, N, K]`, any strides.
        job: format and rule.
        importance: f32 `[K]` or `[E, K]` in place of the job's, for a part of its weight; None: the job's.

    Returns:
        uint8 `[N, row_bytes]` or `[E, N, row_bytes]`.

    Raises:
        ValueError: as the operator `quantize`; of a stack it says which expert.
    """
    importance = job.importance if importance is None else importance
    if importance is not None:
        importance = importance.to(weight.device)
    if weight.dim() == 2:
        packed: Tensor = torch.ops.isqtorch.quantize(weight, job.fmt.name, importance, job.rule)
        return packed
    experts, rows, columns = weight.shape
    out = weight.new_empty((experts, rows, job.fmt.row_bytes(columns)), dtype=torch.uint8)
    for expert in range(experts):  # matrix by matrix: a stack that is stored transposed is copied in no larger pieces
        vector = importance[expert] if importance is not None and importance.dim() == 2 else importance
        try:
            out[expert] = torch.ops.isqtorch.quantize(weight[expert], job.fmt.name, vector, job.rule)
        except ValueError as error:
            raise ValueError(f"expert {expert}: {error}") from None
    return out


def relative_error(weight: Tensor, packed: Tensor, fmt: QuantFormat) -> float:
    """RMS of (decoded - weight) over RMS of weight, `[.., N, K]` against `[.., N, row_bytes]`; a few rows at a time."""
    difference = total = 0.0
    step = max(1, _ERROR_CHUNK // weight.shape[-1])
    for matrix, bytes_ in zip(weight, packed, strict=True) if weight.dim() == 3 else [(weight, packed)]:
        for start in range(0, matrix.shape[0], step):
            rows = matrix[start : start + step].float()
            decoded = torch.ops.isqtorch.dequantize(bytes_[start : start + step], fmt.name, torch.float32)
            difference += (decoded - rows).double().square().sum().item()
            total += rows.double().square().sum().item()
    return float((difference / total) ** 0.5) if total else 0.0
