"""The operators in plain torch: slow, simple, on any device. Native kernels are tested against them."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from isqtorch.quantizers import needs_whole, solve
from isqtorch.quantizers.denormals import blocks_per_chunk, denormals_kept

from .checks import (
    check_dequantize,
    check_embedding,
    check_expert_ids,
    check_experts,
    check_experts_dx,
    check_finite,
    check_ids,
    check_importance,
    check_linear,
    check_quantize,
    check_scales,
    check_square_sums,
    format_named,
)
from .feedback import quantize_feedback as quantize_feedback

_SQUARED_AT_ONCE = 1 << 24  # number of values that square_sums copies to f32 at a time


@torch.no_grad()
def quantize(w: Tensor, format: str, importance: Tensor | None = None, rule: str | None = None) -> Tensor:
    """Quantize and pack matrices.

    Args:
        w: float `[..., N, K]`, any strides; leading dimensions are separate matrices.
        format: name of the format.
        importance: float `[K]`, or `[..., K]` with a vector per matrix; ignored if the rule has no search.
        rule: alternative rule of the format's quantizer: afq "mlx" or "search", hqq "search".

    Returns:
        uint8 `[..., N, row_bytes]`.

    Raises:
        ValueError: arguments do not fit the format or each other, or weights are not finite or too large.
    """
    fmt = format_named("quantize", format)
    row_bytes = check_quantize(w, fmt, importance, rule)
    vectors = check_importance(importance, w)  # [1 or E, K]
    w32 = w.detach().float()
    check_finite(w, w32, fmt)

    *matrices, rows, columns = w.shape
    if needs_whole(fmt):  # its search stops by the error of a whole matrix
        apart = w32.reshape(-1, rows, columns) if w32.numel() else w32.reshape(1, 0, columns)
        own = [None] * len(apart) if vectors is None or not w32.numel() else vectors.expand(len(apart), columns)
        parts = [solve(fmt, matrix, vector, rule) for matrix, vector in zip(apart, own, strict=True)]
        fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    else:
        stacked = w32.reshape(w32.numel() // columns, columns)
        fields = solve(fmt, stacked, vectors if w32.numel() else None, rule)
    check_scales(fields, w32, fmt)
    return fmt.pack(fields).view(*matrices, rows, row_bytes)


@torch.no_grad()
def dequantize(weight: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Decode packed matrices: uint8 `[..., N, row_bytes]` -> `[..., N, K]`.

    Weights are computed in f32 and then rounded to `dtype`.
    """
    fmt = format_named("dequantize", format)
    columns = check_dequantize(weight, fmt, dtype)
    blocks = weight.reshape(weight.numel() // fmt.block_bytes, fmt.block_bytes)
    out = torch.empty(blocks.shape[0], fmt.block, dtype=dtype, device=weight.device)
    with denormals_kept() if weight.device.type == "cpu" else nullcontext():
        chunk = blocks_per_chunk(fmt.block, weight.device)
        for start in range(0, blocks.shape[0], chunk):
            out[start : start + chunk] = fmt.decode(fmt.unpack(blocks[start : start + chunk])).to(dtype)
    return out.view(*weight.shape[:-1], columns)


def linear(x: Tensor, weight: Tensor, format: str, bias: Tensor | None = None) -> Tensor:
    """Compute `x @ dequantize(weight).T + bias` in f32, rounded to the type of x.

    Args:
        x: f32, f16 or bf16 `[..., K]`.
        weight: uint8 `[N, row_bytes]`.
        format: name of the weight's format.
        bias: float `[N]`.

    Returns:
        `[..., N]`, same dtype as x.
    """
    fmt = format_named("linear", format)
    check_linear(x, weight, fmt, bias)
    y = x.float() @ dequantize(weight, format, torch.float32).t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


@torch.no_grad()
def embedding(ids: Tensor, weight: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Decode the rows that ids select: int64 or int32 `[...]` -> `[..., K]`.

    Raises:
        IndexError: an id is out of range.
    """
    columns = check_embedding(ids, weight, format_named("embedding", format), dtype)
    check_ids(ids, weight)
    rows = weight[ids.reshape(-1).long()]  # [M, row_bytes]
    return dequantize(rows, format, dtype).view(*ids.shape, columns)


def experts_linear(x: Tensor, weight: Tensor, format: str, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each slot of a token by the matrix of its expert: a `linear` whose weight differs from row to row.

    Args:
        x: f32, f16 or bf16 `[T, K]`, one row for all slots of a token, or `[T, S, K]`.
        weight: uint8 `[E, N, row_bytes]`.
        format: name of the weight's format.
        ids: int64 or int32 `[T, S]`, the expert of each slot. E means an expert on another rank.
        bias: float `[E, N]`.

    Returns:
        `[T, S, N]`, same dtype as x. Slots whose expert is on another rank get zeros, without a bias.

    Raises:
        ValueError: arguments do not fit each other.
        IndexError: an id is below 0 or above E.
    """
    check_experts(x, weight, format_named("experts_linear", format), ids, bias)
    rows = x if x.ndim == 3 else x[:, None, :].expand(*ids.shape, x.shape[-1])
    y = x.new_zeros(*ids.shape, weight.shape[1])
    for expert in _used(ids, weight.shape[0]):
        chosen = ids == expert  # [T, S]
        y[chosen] = linear(rows[chosen], weight[expert], format, None if bias is None else bias[expert])
    return y


def _used(ids: Tensor, experts: int) -> list[int]:
    """List the experts of a stack of so many that ids name."""
    return [expert for expert in ids.unique().tolist() if expert < experts]


@torch.no_grad()
def experts_linear_dx(dy: Tensor, weight: Tensor, format: str, ids: Tensor) -> Tensor:
    """Compute the gradient of x: `dx[t, s] = dy[t, s] @ dequantize(weight[ids[t, s]])`, `[T, S, N]` -> `[T, S, K]`.

    The float weights of one expert at a time are in memory. Finding the rows of an expert waits for the device, so that
    ids can be checked on every device.

    Raises:
        ValueError: arguments do not fit each other.
        IndexError: an id is below 0 or above E.
    """
    columns = check_experts_dx(dy, weight, format_named("experts_linear_dx", format), ids)
    check_expert_ids("experts_linear_dx", ids, weight.shape[0])
    dx = dy.new_zeros(*ids.shape, columns)
    for expert in _used(ids, weight.shape[0]):
        chosen = ids == expert
        dx[chosen] = dy[chosen] @ torch.ops.isqtorch.dequantize(weight[expert], format, dy.dtype)
    return dx


@torch.no_grad()
def square_sums(x: Tensor, groups: Tensor | None = None, count: int = 1) -> Tensor:
    """Sum the squares of each column, as an importance matrix needs them.

    Args:
        x: float `[..., K]`.
        groups: integers `[rows, slots]`, the groups of each row of x (the experts that it is routed to). Values outside
            0 .. count - 1 are ignored. None: all rows are in group 0.
        count: number of groups.

    Returns:
        f32 `[count, K]`.

    Raises:
        ValueError: wrong types or shapes, or `count` is not positive.
    """
    check_square_sums(x, groups, count)
    rows = x.detach().reshape(-1, x.shape[-1])
    sums = torch.zeros(count, x.shape[-1], device=x.device)  # first: a count that no memory holds fails here
    if groups is None:
        member = torch.ones(1, len(rows), device=x.device)
        member = torch.cat([member, member.new_zeros(count - 1, len(rows))])
    else:
        ids = torch.arange(count, device=x.device)
        groups = groups if groups.numel() else groups.new_zeros(len(rows), 0)  # sizes beside a 0 may overflow products
        member = (groups.to(x.device)[..., None] == ids).sum(1).t().to(torch.float32)  # [count, rows]
    step = max(1, _SQUARED_AT_ONCE // x.shape[-1])
    for start in range(0, len(rows), step):
        sums.addmm_(member[:, start : start + step], rows[start : start + step].float().square())
    return sums
