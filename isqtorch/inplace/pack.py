"""Packing one weight, and the error that packing leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat

from .prepare import Job


def pack_stack(weight: Tensor, fmt: QuantFormat, importance: Tensor | None, rule: str | None) -> Tensor:
    """Quantize matrix by matrix, so that a stack that is stored transposed is copied in no larger pieces.

    Args:
        weight: float `[E, N, K]`, any strides.
        fmt: the format.
        importance: f32 `[K]`, or `[E, K]`.
        rule: alternative rule of the format's quantizer.

    Returns:
        uint8 `[E, N, row_bytes]`.

    Raises:
        ValueError: as the operator `quantize`; says which expert.
    """
    experts, rows, columns = weight.shape
    out = weight.new_empty((experts, rows, fmt.row_bytes(columns)), dtype=torch.uint8)
    for expert in range(experts):
        vector = importance[expert] if importance is not None and importance.dim() == 2 else importance
        try:
            out[expert] = torch.ops.isqtorch.quantize(weight[expert], fmt.name, vector, rule)
        except ValueError as error:
            raise ValueError(f"expert {expert}: {error}") from None
    return out


_ERROR_CHUNK = 1 << 17  # weights compared at a time by measure_error


def pack_weight(weight: Tensor, job: Job, measure: bool) -> tuple[Tensor, float | None]:
    """The packed form of `[N, K]` or `[E, N, K]`, and its relative error if it is asked for."""
    importance = None if job.importance is None else job.importance.to(weight.device)
    pack = pack_stack if weight.dim() == 3 else _quantize
    packed = pack(weight, job.fmt, importance, job.rule)
    return packed, relative_error(weight, packed, job.fmt) if measure else None


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


def _quantize(weight: Tensor, fmt: QuantFormat, importance: Tensor | None, rule: str | None) -> Tensor:
    packed: Tensor = torch.ops.isqtorch.quantize(weight, fmt.name, importance, rule)
    return packed
