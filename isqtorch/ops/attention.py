"""Attention over packed keys and values in plain torch, and the checks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .checks import ACTIVATION_DTYPES, check_devices, check_packed, check_size, format_named

_OP = "attention"
_BLOCK = 32  # rows must have whole runs of so many numbers: what the kernels decode at a time


@torch.no_grad()
def attention(
    q: Tensor, k: Tensor, v: Tensor, k_format: str, v_format: str, scale: float, mask: Tensor | None
) -> Tensor:
    """Compute `softmax(scale * q @ k.T + mask) @ v` with decoded k and v: in f32 on a CPU, elsewhere in the type of q.

    Args:
        q: f32, f16 or bf16 `[B, H, R, D]`.
        k: packed keys, uint8 `[B, G, S, bytes of D]`; each of the G heads is for H / G heads of q.
        v: packed values, uint8 `[B, G, S, bytes of V]`.
        k_format, v_format: names of the formats.
        scale: of the scores.
        mask: bool, True for what a query sees, or float, which is added to the scores: `[B, H, R, S]`, with 1 in the
            place of B, H or R if it is the same for all.

    Returns:
        `[B, H, R, V]`, same dtype as q; zeros for a query that sees nothing.

    Raises:
        ValueError: arguments do not fit each other.
    """
    check_attention(q, k, v, k_format, v_format, mask)
    dtype = torch.float32 if q.device.type == "cpu" else q.dtype
    keys = torch.ops.isqtorch.dequantize(k, k_format, dtype)
    values = torch.ops.isqtorch.dequantize(v, v_format, dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    out = functional.scaled_dot_product_attention(
        q.to(dtype), keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask != -torch.inf
        out = torch.where(seen.any(-1, keepdim=True), out, torch.zeros_like(out))
    return out.to(q.dtype)


def check_attention(q: Tensor, k: Tensor, v: Tensor, k_format: str, v_format: str, mask: Tensor | None) -> int:
    """Check types, shapes and devices of the arguments of `attention`.

    Returns:
        V, the numbers in a row of v.
    """
    if q.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{_OP}: q must be one of float32, float16, bfloat16, got {_spelled(q.dtype)}.")
    dim, value_dim = _row("k", k, k_format), _row("v", v, v_format)
    if q.ndim != 4:
        raise ValueError(f"{_OP}: q must have 4 dimensions [B, heads, queries, head_dim], got shape {list(q.shape)}.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{_OP}: k and v must have the same batch, heads and tokens, got shapes {list(k.shape)} and {list(v.shape)}."
        )
    if q.shape[3] != dim:
        raise ValueError(
            f"{_OP}: the last dimension of q must be {dim}, the numbers in a row of k, got shape {list(q.shape)}."
        )
    if q.shape[0] != k.shape[0] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{_OP}: q must have the batch of k and a multiple of its heads, got shapes {list(q.shape)} and {list(k.shape)}."
        )
    check_devices(_OP, k, q=q, v=v, mask=mask)
    if mask is not None:
        _check_mask(mask, [*q.shape[:3], k.shape[2]])
    check_size((*q.shape[:3], value_dim))
    return value_dim


def _row(name: str, states: Tensor, format: str) -> int:
    """Check packed keys or values; return the numbers in a row."""
    if states.ndim != 4:
        raise ValueError(
            f"{_OP}: {name} must have 4 dimensions [B, heads, tokens, row_bytes], got shape {list(states.shape)}."
        )
    columns = check_packed(_OP, states, format_named(_OP, format))
    if columns % _BLOCK:
        raise ValueError(f"{_OP}: rows of {name} must have a multiple of {_BLOCK} numbers, got {columns} of {format}.")
    return columns


def _check_mask(mask: Tensor, scores: list[int]) -> None:
    """Check the type of a mask, and that it can be broadcast to the scores `[B, H, R, S]`."""
    fits = mask.ndim == 4 and mask.shape[3] == scores[3]
    if not fits or any(size not in (1, wanted) for size, wanted in zip(mask.shape, scores, strict=True)):
        raise ValueError(
            f"{_OP}: mask must have shape {scores}, or 1 in place of some of its first three sizes; got {list(mask.shape)}."
        )
    if mask.dtype != torch.bool and mask.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{_OP}: mask must be bool or one of float32, float16, bfloat16, got {_spelled(mask.dtype)}.")


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
