"""The operators of one decoding step: what they compute, in plain torch, and their shapes for tracing.

A step of a small model is hundreds of operators that take a few microseconds each. Each operator here stands for
several of them. The kernels are in csrc/cpu/ops_steps.cpp; other devices, and a CPU without compiled kernels, run these
functions. None has a gradient.

The kernels give the bits of these functions if `lanes` is the number of floats in the vectors of torch's sums, except
for `step_attend`, which adds in an order of its own. SiLU has the bits of torch where the values fill its vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isqtorch.formats import get_format

STYLES = ("rounded", "scaled", "one plus")
"""What is done with x / rms(x): rounded to the type of x and multiplied by the weight, as in Llama; multiplied before it
is rounded; or multiplied by 1 + weight, as in Gemma. An operator takes the index."""


def step_norm(x: Tensor, weight: Tensor, eps: float, style: int, lanes: int) -> Tensor:
    """Compute x / rms(x) * weight over the last dimension, in f32.

    Args:
        x: f32, f16 or bf16 `[..., K]`.
        weight: `[K]`, of the type of x.
        eps: is added to the mean of squares.
        style: an index of `STYLES`.
        lanes: 4, 8 or 16; only the kernel reads it.

    Returns:
        `[..., K]`, of the type of x.
    """
    _check_norm("step_norm", weight, x.shape[-1], x.dtype, style, lanes)
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if STYLES[style] == "rounded":
        return weight * normed.to(x.dtype)
    factor = weight.float() if STYLES[style] == "scaled" else 1.0 + weight.float()
    return (normed * factor).to(x.dtype)


def step_gate(x: Tensor) -> Tensor:
    """Compute silu(g) * u of a gate and what it gates.

    Args:
        x: f32, f16 or bf16 `[..., 2 N]`: g, then u.

    Returns:
        `[..., N]`, of the type of x.
    """
    _check_halves("step_gate", x.shape[-1])
    gate, gated = x.chunk(2, dim=-1)
    return functional.silu(gate.contiguous()) * gated


def step_linears(
    x: Tensor,
    weights: list[Tensor],
    formats: list[str],
    biases: list[Tensor | None],
    norm: Tensor | None,
    eps: float,
    style: int,
    lanes: int,
    gate: bool,
) -> Tensor:
    """Compute the products of the norm of x with several packed weights, side by side.

    Args:
        x: f32, f16 or bf16 `[..., K]`.
        weights: uint8 `[N, row_bytes]` each, with the same K.
        formats: names of their formats.
        biases: float `[N]` or None, for each.
        norm: weight of a norm of x; None: x is not normed.
        eps, style, lanes: see `step_norm`.
        gate: whether the first half g of the outputs and the second half u become silu(g) * u.

    Returns:
        `[..., sum of N]`, or half as wide with a gate.
    """
    if not weights or not len(weights) == len(formats) == len(biases):
        raise ValueError(
            "step_linears: weights, formats and biases must be lists of one length, and not empty; "
            f"got {len(weights)}, {len(formats)} and {len(biases)}."
        )
    if norm is not None:
        x = step_norm(x, norm, eps, style, lanes)
    parts = [
        torch.ops.isqtorch.linear_frozen(x, weight, format, bias)
        for weight, format, bias in zip(weights, formats, biases, strict=True)
    ]
    y = torch.cat(parts, dim=-1)
    return step_gate(y) if gate else y


def step_linear_add(
    x: Tensor,
    weight: Tensor,
    format: str,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor | None,
    eps: float,
    style: int,
    lanes: int,
) -> Tensor:
    """Compute residual + norm(x @ dequantize(weight).T + bias).

    Args:
        x: f32, f16 or bf16 `[..., K]`.
        weight: uint8 `[N, row_bytes]`.
        format: name of its format.
        bias: float `[N]`.
        residual: `[..., N]`, of the type of x.
        norm: weight of a norm of the product, `[N]`; None: it is not normed.
        eps, style, lanes: see `step_norm`.

    Returns:
        `[..., N]`, of the type of x.
    """
    y: Tensor = torch.ops.isqtorch.linear_frozen(x, weight, format, bias)
    if residual.shape != y.shape or residual.dtype != y.dtype:
        raise ValueError(
            f"step_linear_add: the residual must be {y.dtype} {list(y.shape)}, "
            f"got {residual.dtype} {list(residual.shape)}."
        )
    return residual + (y if norm is None else step_norm(y, norm, eps, style, lanes))


def step_heads(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    style: int,
    lanes: int,
) -> Tensor:
    """Turn the queries and keys of one token to its position, and write keys and values into a cache.

    Args:
        x: `[B, 1, Hq * D + 2 * H * D]`: the queries of all heads, their keys, their values.
        cos, sin: `[B, 1, R]` or `[1, 1, R]`, R <= D: the first R values of a head are turned, as pairs of value i and
            value i + R / 2.
        keys, values: the cache, `[B, H, C, D]`.
        at: the column to write.
        q_norm, k_norm: `[D]`, weights of norms of each head before it is turned.
        eps, style, lanes: see `step_norm`.

    Returns:
        Queries `[B, Hq, 1, D]`.
    """
    batch, heads, columns, dim = keys.shape
    if not 0 <= at < columns:
        raise ValueError(f"step_heads: there is no column {at} in a cache of {columns}.")
    queries = _queries(x, keys, values)
    q, k, v = x.split((queries * dim, heads * dim, heads * values.shape[-1]), dim=-1)
    q, k, v = (part.view(batch, 1, -1, size) for part, size in ((q, dim), (k, dim), (v, values.shape[-1])))
    if q_norm is not None:
        q = step_norm(q, q_norm, eps, style, lanes)
    if k_norm is not None:
        k = step_norm(k, k_norm, eps, style, lanes)
    keys[:, :, at] = _turned(k, cos, sin)[:, 0]
    values[:, :, at] = v[:, 0]
    return _turned(q, cos, sin).transpose(1, 2).contiguous()


def step_attend(
    q: Tensor, keys: Tensor, values: Tensor, first: int, last: int, scale: float, mask: Tensor | None
) -> Tensor:
    """Compute the attention of one token to the columns of a cache.

    Args:
        q: `[B, Hq, 1, D]`; Hq / H heads share a head of keys.
        keys, values: the cache, `[B, H, C, D]`.
        first, last: the columns [first, last) are seen.
        scale: factor of the products of queries and keys.
        mask: bool `[B, 1, 1, last - first]` or `[1, 1, 1, last - first]`; False: the column is not seen. A sequence that
            sees nothing gets zeros.

    Returns:
        `[B, 1, Hq * D]`.
    """
    if not 0 <= first < last <= keys.shape[2]:
        raise ValueError(f"step_attend: columns {first} to {last} are not in a cache of {keys.shape[2]}.")
    batch, heads, _, dim = q.shape
    groups = heads // keys.shape[1]
    k, v = (part[:, :, first:last].repeat_interleave(groups, dim=1).float() for part in (keys, values))
    y = functional.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask, scale=scale)
    return y.to(q.dtype).transpose(1, 2).reshape(batch, 1, heads * dim)


def step_attention(
    x: Tensor,
    weights: list[Tensor],
    formats: list[str],
    biases: list[Tensor | None],
    norm: Tensor | None,
    eps: float,
    style: int,
    lanes: int,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    first: int,
    last: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    heads_eps: float,
    heads_style: int,
    heads_lanes: int,
    scale: float,
    mask: Tensor | None,
    o: Tensor,
    o_format: str,
    o_bias: Tensor | None,
    after: Tensor | None,
    after_eps: float,
    after_style: int,
    after_lanes: int,
) -> Tensor:
    """Compute the attention half of a decoder layer: `step_linears`, `step_heads`, `step_attend`, `step_linear_add`.

    Args:
        x: the hidden states of one token, `[B, 1, K]`.
        weights, formats, biases, norm, eps, style, lanes: of queries, keys and values; see `step_linears`.
        cos, sin, keys, values: see `step_heads`. The token is written to column last - 1.
        first, last, scale, mask: see `step_attend`.
        q_norm, k_norm, heads_eps, heads_style, heads_lanes: norms of each head; see `step_heads`.
        o, o_format, o_bias, after, after_eps, after_style, after_lanes: the output; see `step_linear_add`.

    Returns:
        `[B, 1, K]`.
    """
    qkv = step_linears(x, weights, formats, biases, norm, eps, style, lanes, False)
    q = step_heads(qkv, cos, sin, keys, values, last - 1, q_norm, k_norm, heads_eps, heads_style, heads_lanes)
    y = step_attend(q, keys, values, first, last, scale, mask)
    return step_linear_add(y, o, o_format, o_bias, x, after, after_eps, after_style, after_lanes)


def step_mlp(
    x: Tensor,
    weights: list[Tensor],
    formats: list[str],
    biases: list[Tensor | None],
    norm: Tensor | None,
    eps: float,
    style: int,
    lanes: int,
    down: Tensor,
    down_format: str,
    down_bias: Tensor | None,
    after: Tensor | None,
    after_eps: float,
    after_style: int,
    after_lanes: int,
) -> Tensor:
    """Compute the MLP half of a decoder layer: `step_linears` with a gate, `step_linear_add`.

    Args:
        x: `[..., K]`.
        weights, formats, biases, norm, eps, style, lanes: of gate and up projection; see `step_linears`.
        down, down_format, down_bias, after, after_eps, after_style, after_lanes: see `step_linear_add`.

    Returns:
        `[..., K]`.
    """
    y = step_linears(x, weights, formats, biases, norm, eps, style, lanes, True)
    return step_linear_add(y, down, down_format, down_bias, x, after, after_eps, after_style, after_lanes)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `[B, 1, H, D]`, of which the first values are turned by angles `[B, 1, R]`."""
    size = cos.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    first, second = rotated.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return torch.cat((rotated * cos.unsqueeze(2) + swapped * sin.unsqueeze(2), rest), dim=-1)


def _queries(x: Tensor, keys: Tensor, values: Tensor) -> int:
    """The number of heads of queries in rows that also hold keys and values."""
    heads, dim = keys.shape[1], keys.shape[3]
    left = x.shape[-1] - heads * (dim + values.shape[-1])
    if left <= 0 or left % dim:
        raise ValueError(
            f"step_heads: rows of x hold queries of {dim} values, {heads} keys and as many values; "
            f"{x.shape[-1]} is no such width."
        )
    return left // dim


def _check_norm(op: str, weight: Tensor, columns: int, dtype: torch.dtype, style: int, lanes: int) -> None:
    if list(weight.shape) != [columns]:
        raise ValueError(f"{op}: the weight of the norm must have shape [{columns}], got {list(weight.shape)}.")
    if weight.dtype != dtype:
        raise ValueError(f"{op}: the weight of the norm must have the type of x, got {weight.dtype}.")
    if not 0 <= style < len(STYLES):
        raise ValueError(f"{op}: style must be 0, 1 or 2, got {style}.")
    if lanes not in (4, 8, 16):
        raise ValueError(f"{op}: lanes must be 4, 8 or 16, got {lanes}.")


def _check_halves(op: str, width: int) -> None:
    if width % 2:
        raise ValueError(f"{op}: a gate and what it gates must be as wide as each other, got {width} values.")


for _op in (step_norm, step_gate, step_linears, step_linear_add, step_heads, step_attend, step_attention, step_mlp):
    torch.library.impl(f"isqtorch::{_op.__name__}", "CompositeExplicitAutograd", torch.no_grad()(_op))


@torch.library.register_fake("isqtorch::step_norm")
def _(x: Tensor, weight: Tensor, eps: float, style: int, lanes: int) -> Tensor:
    _check_norm("step_norm", weight, x.shape[-1], x.dtype, style, lanes)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("isqtorch::step_gate")
def _(x: Tensor) -> Tensor:
    _check_halves("step_gate", x.shape[-1])
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.register_fake("isqtorch::step_linears")
def _(
    x: Tensor,
    weights: list[Tensor],
    formats: list[str],
    biases: list[Tensor | None],
    norm: Tensor | None,
    eps: float,
    style: int,
    lanes: int,
    gate: bool,
) -> Tensor:
    for weight, format in zip(weights, formats, strict=True):
        get_format(format).in_features(weight.shape[-1])
    width = sum(weight.shape[0] for weight in weights)
    if gate:
        _check_halves("step_linears", width)
    return x.new_empty((*x.shape[:-1], width // 2 if gate else width))


@torch.library.register_fake("isqtorch::step_linear_add")
def _(
    x: Tensor,
    weight: Tensor,
    format: str,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor | None,
    eps: float,
    style: int,
    lanes: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("isqtorch::step_heads")
def _(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    at: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    style: int,
    lanes: int,
) -> Tensor:
    return x.new_empty((keys.shape[0], _queries(x, keys, values), 1, keys.shape[3]))


@torch.library.register_fake("isqtorch::step_attend")
def _(q: Tensor, keys: Tensor, values: Tensor, first: int, last: int, scale: float, mask: Tensor | None) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1] * q.shape[3]))


@torch.library.register_fake("isqtorch::step_attention")
def _(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("isqtorch::step_mlp")
def _(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
