"""The operator `quantize_feedback` in plain torch, on any device, and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat
from isqtorch.quantizers import solve_feedback

from .checks import check_devices, check_finite, check_importance, check_quantize, check_scales, format_named

_ROWS_CHECKED = 1024  # of the factor at a time


@torch.no_grad()
def quantize_feedback(w: Tensor, format: str, factor: Tensor, importance: Tensor, rule: str | None = None) -> Tensor:
    """Quantize and pack a matrix whose codes make up for each other's errors.

    Args:
        w: float `[N, K]`, any strides.
        format: name of the format.
        factor: f32 `[K, K]`, upper triangular: `isqtorch.quantizers.feedback_factor` of the inputs' moments.
        importance: float `[K]`, the diagonal of the moments.
        rule: alternative rule of the format's quantizer for the scales, as for `quantize`.

    Returns:
        uint8 `[N, row_bytes]`.

    Raises:
        ValueError: arguments do not fit the format or each other, or weights are not finite or too large.
    """
    fmt = format_named("quantize_feedback", format)
    row_bytes = check_feedback(w, fmt, factor, importance, rule)
    vectors = check_importance(importance, w)
    assert vectors is not None
    factor = factor.detach()
    check_factor(factor)
    w32 = w.detach().float()
    check_finite(w, w32, fmt)
    fields, seen, targets = solve_feedback(fmt, w32, factor, vectors[0], rule)
    _check_result(fmt, fields, seen, targets)
    return fmt.pack(fields).view(w.shape[0], row_bytes)


def check_feedback(w: Tensor, fmt: QuantFormat, factor: Tensor, importance: Tensor, rule: str | None) -> int:
    """Check everything about the arguments of `quantize_feedback` except their values.

    Returns:
        Bytes of a packed row.
    """
    row_bytes = check_quantize(w, fmt, importance, rule)
    if w.ndim != 2:
        raise ValueError(
            f"quantize_feedback: weight must be one matrix [N, K], got shape {list(w.shape)}. Matrices of a stack have inputs of "
            "their own: pack them one by one."
        )
    columns = w.shape[1]
    if factor.dtype != torch.float32 or factor.shape != (columns, columns):
        raise ValueError(
            f"quantize_feedback: factor must be float32 [{columns}, {columns}] for a weight of {columns} columns, got "
            f"{str(factor.dtype).removeprefix('torch.')} {list(factor.shape)}. Is this the factor of another layer?"
        )
    check_devices("quantize_feedback", w, factor=factor)
    return row_bytes


def check_factor(factor: Tensor) -> None:
    """Check that a factor `[K, K]` is upper triangular and finite, with a positive diagonal."""
    for start in range(0, len(factor), _ROWS_CHECKED):
        rows = factor[start : start + _ROWS_CHECKED]
        at = torch.arange(start, start + len(rows), device=factor.device)[:, None]
        column = torch.arange(len(factor), device=factor.device)
        bad = ~rows.isfinite() | ((column < at) & (rows != 0)) | ((column == at) & (rows <= 0))
        if bool(bad.any()):
            i, j = divmod(int(bad.reshape(-1).int().argmax()), len(factor))
            raise ValueError(
                f"quantize_feedback: factor[{start + i}, {j}] is {float(rows[i, j]):.6g}; a factor has zeros below its diagonal, "
                "positive numbers on it and finite numbers above. Make it with isqtorch.quantizers.feedback_factor."
            )


def _check_result(fmt: QuantFormat, fields: Fields, seen: Tensor, targets: Tensor) -> None:
    """Check scales, and that no sum of carried errors overflows. In a row, the first fault causes those behind it.

    Args:
        fmt: the format.
        fields, seen, targets: see `solve_feedback`.
    """
    lost = ~targets.reshape(-1, fmt.block).isfinite().all(dim=1)  # [blocks]
    first = int(lost.int().argmax()) if bool(lost.any()) else None
    if first is not None:  # scales behind it mean nothing, nor its own if the quantizer saw more than f32 holds
        blocks = seen.clone().view(-1, fmt.block)
        end = first + int(bool(blocks[first].isfinite().all()))
        blocks[end:] = 0
        seen = blocks.view_as(seen)
        fields = {name: torch.cat([part[:end], torch.zeros_like(part[end:])]) for name, part in fields.items()}
    check_scales(fields, seen, fmt)
    if first is not None:
        i, j = divmod(first * fmt.block, seen.shape[1])
        raise ValueError(
            f"quantize_feedback: the errors carried to the block of {fmt.name} from weight[{i}, {j}] on are larger than float32 can "
            "hold. Make the factor from moments with more damping, or scale the weight down."
        )
