"""Registrations of the operators besides their native kernels: fakes (shapes without data), gradients, and the plain
PyTorch reference for devices without native kernels.

The schemas are defined in C++ (csrc/ops.cpp). The packed weight is frozen: `linear` and `experts_linear` have gradients
for x and the bias only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import feedback, native, reference
from .attention import attention, check_attention
from .checks import (
    check_dequantize,
    check_embedding,
    check_experts_dx,
    check_experts_shapes,
    check_linear,
    check_quantize,
    check_square_sums,
    check_w8a8,
    format_named,
)
from .metal import ops as metal

_DEVICES = ("cpu", "cuda", "mps", "xpu")
_REFERENCE = (
    reference.quantize,
    reference.dequantize,
    reference.linear,
    reference.embedding,
    reference.experts_linear,
)

for _op in (metal.quantize, metal.dequantize, metal.linear, metal.embedding, metal.experts_linear):
    torch.library.impl(f"isqtorch::{_op.__name__}", "mps", _op)
for _device in _DEVICES:
    for _op in _REFERENCE if _device not in native.NATIVE_DEVICES else ():
        torch.library.impl(f"isqtorch::{_op.__name__}", _device, _op)
    if _device != "cpu" or native.LIBRARY is None:
        torch.library.impl("isqtorch::square_sums", _device, reference.square_sums)
        torch.library.impl("isqtorch::quantize_feedback", _device, reference.quantize_feedback)
        torch.library.impl("isqtorch::attention", _device, attention)
    # it calls the operator `dequantize`, so it decodes with the native kernel if there is one
    torch.library.impl("isqtorch::experts_linear_dx", _device, reference.experts_linear_dx)


# `linear_frozen` is `linear` without a gradient. Devices without a kernel of its own use that of `linear`.
@torch.library.impl("isqtorch::linear_frozen", "CompositeExplicitAutograd")
def _(x: Tensor, weight: Tensor, format: str, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.isqtorch.linear.default(x, weight, format, bias)
    return y


def _linear_w8a8(x: Tensor, weight: Tensor, format: str, bias: Tensor | None = None) -> Tensor:
    """Compute `linear`: on devices without an FP8 product, x is not rounded."""
    check_w8a8(format)
    y: Tensor = torch.ops.isqtorch.linear_frozen.default(x, weight, format, bias)
    return y


for _name in ("linear_w8a8", "linear_w8a8_frozen"):
    torch.library.impl(f"isqtorch::{_name}", "CompositeExplicitAutograd", _linear_w8a8)


@torch.library.register_fake("isqtorch::quantize")
def _(w: Tensor, format: str, importance: Tensor | None = None, rule: str | None = None) -> Tensor:
    row_bytes = check_quantize(w, format_named("quantize", format), importance, rule)
    return w.new_empty((*w.shape[:-1], row_bytes), dtype=torch.uint8)


@torch.library.register_fake("isqtorch::quantize_feedback")
def _(w: Tensor, format: str, factor: Tensor, importance: Tensor, rule: str | None = None) -> Tensor:
    row_bytes = feedback.check_feedback(w, format_named("quantize_feedback", format), factor, importance, rule)
    return w.new_empty((w.shape[0], row_bytes), dtype=torch.uint8)


@torch.library.register_fake("isqtorch::dequantize")
def _(weight: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    columns = check_dequantize(weight, format_named("dequantize", format), dtype)
    return weight.new_empty((*weight.shape[:-1], columns), dtype=dtype)


def _linear_shape(x: Tensor, weight: Tensor, format: str, bias: Tensor | None = None) -> Tensor:
    check_linear(x, weight, format_named("linear", format), bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_w8a8_shape(x: Tensor, weight: Tensor, format: str, bias: Tensor | None = None) -> Tensor:
    check_w8a8(format)
    return _linear_shape(x, weight, format, bias)


for _name in ("linear", "linear_frozen"):
    torch.library.register_fake(f"isqtorch::{_name}", _linear_shape)
for _name in ("linear_w8a8", "linear_w8a8_frozen"):
    torch.library.register_fake(f"isqtorch::{_name}", _linear_w8a8_shape)


@torch.library.register_fake("isqtorch::embedding")
def _(ids: Tensor, weight: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    columns = check_embedding(ids, weight, format_named("embedding", format), dtype)
    return ids.new_empty((*ids.shape, columns), dtype=dtype)


@torch.library.register_fake("isqtorch::experts_linear")
def _(x: Tensor, weight: Tensor, format: str, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    check_experts_shapes(x, weight, format_named("experts_linear", format), ids, bias)
    return x.new_empty((*ids.shape, weight.shape[1]))


@torch.library.register_fake("isqtorch::experts_linear_dx")
def _(dy: Tensor, weight: Tensor, format: str, ids: Tensor) -> Tensor:
    columns = check_experts_dx(dy, weight, format_named("experts_linear_dx", format), ids)
    return dy.new_empty((*ids.shape, columns))


@torch.library.register_fake("isqtorch::square_sums")
def _(x: Tensor, groups: Tensor | None = None, count: int = 1) -> Tensor:
    check_square_sums(x, groups, count)
    return x.new_empty((count, x.shape[-1]), dtype=torch.float32)


@torch.library.register_fake("isqtorch::attention")
def _(q: Tensor, k: Tensor, v: Tensor, k_format: str, v_format: str, scale: float, mask: Tensor | None) -> Tensor:
    columns = check_attention(q, k, v, k_format, v_format, mask)
    return q.new_empty((*q.shape[:3], columns))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, format, bias = inputs
    ctx.save_for_backward(weight)
    ctx.format = format
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
    """Compute the gradients of y = x W^T + b: dx = dy W, and db = the sum of dy over all rows."""
    dx = db = None
    if ctx.needs_input_grad[0]:
        (weight,) = ctx.saved_tensors
        dx = grad @ torch.ops.isqtorch.dequantize(weight, ctx.format, grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:  # index 3 exists only if a bias was passed
        db = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, db


for _name in ("linear", "linear_w8a8"):
    torch.library.register_autograd(f"isqtorch::{_name}", _linear_backward, setup_context=_linear_setup)


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, format, ids, bias = inputs
    ctx.save_for_backward(weight, ids)
    ctx.format = format
    ctx.shared = x.ndim == 2
    ctx.bias_dtype = None if bias is None else bias.dtype


def _experts_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
    """Compute the gradients as for `linear`. If the slots of a token share a row of x, their gradients are added."""
    weight, ids = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.isqtorch.experts_linear_dx(grad, weight, ctx.format, ids)
        dx = dx.sum(1) if ctx.shared else dx
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        experts, rows, _ = weight.shape
        sums = grad.new_zeros((experts + 1, rows), dtype=torch.float32)  # the last row is for experts on other ranks
        db = sums.index_add(0, ids.reshape(-1), grad.reshape(-1, rows).float())[:experts].to(ctx.bias_dtype)
    return dx, None, None, None, db


torch.library.register_autograd("isqtorch::experts_linear", _experts_backward, setup_context=_experts_setup)
