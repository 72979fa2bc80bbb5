"""What refinement changes in a model: the scales and offsets of packed weights, and the vectors of norms.

A change is a number in f32 for each scale, offset or element of a vector: 0 means the value at the beginning, and 1
means one unit more, so that one step size suits all. `write` rounds the changed values to the types in which they are
stored and puts them into the model. A forward therefore always reads what would be saved now. Gradients are those at
the rounded values, and they move the changes, which are not rounded: small steps add up.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isqtorch.formats import QuantFormat
from isqtorch.formats.base import Part
from isqtorch.formats.tunable import tunable_parts
from isqtorch.modules.packed import FLOAT_DTYPES

_CHUNK = 1 << 22  # weights decoded at a time in a backward


class Tuned(Protocol):
    """Something that refinement changes.

    Attributes:
        changes: f32 leaves, which the optimizer moves.
    """

    changes: list[Tensor]

    def write(self) -> None:
        """Put the changed values, rounded, into the model."""

    def take_gradient(self) -> None:
        """After a backward: put the gradient of the model's own parameter, if there is one, into that of the change."""

    def stored(self) -> list[Tensor]:
        """Copies of what the model holds now, for `put_back`."""

    def put_back(self, stored: list[Tensor]) -> None:
        """Put copies that `stored` gave into the model. The changes stay."""


class Scales:
    """The scales and offsets of one packed weight.

    The unit of a scale is the scale itself. That of an offset is one step of the codes, or the offset itself if integers
    of the block multiply it. A change of a scale turns the line through a block's weights about the middle code, not
    about code 0, at the edge: then scale and offset hardly depend on each other.

    Attributes:
        packed: uint8 `[N, row_bytes]`, the bytes in the model, which are changed in place.
        fmt: their format.
        changes: of the scales, and of the offsets if there are any, f32 `[N * K / block]`.
    """

    def __init__(self, packed: Tensor, fmt: QuantFormat) -> None:
        self.packed, self.fmt = packed, fmt
        scale, offset = tunable_parts(fmt)
        self._parts: list[Part] = [scale] if offset is None else [scale, offset]
        fields = fmt.split(self._blocks())
        self._start = [fields[part.name].float() for part in self._parts]
        self._units = [self._start[0]]
        self._middle = 0.0
        if offset is not None:
            own = fmt.offset_times_integers
            size = self._start[1] if own else self._start[0].abs()
            self._units.append(torch.ones_like(size) if fmt.offset_in_steps else size)
            if not own and not fmt.offset_in_steps:
                self._middle = (len(fmt.codes) - 1) / 2
        self.changes = [torch.zeros_like(start).requires_grad_() for start in self._start]

    def _blocks(self) -> Tensor:
        return self.packed.view(-1, self.fmt.block_bytes)

    def write(self) -> None:
        moves = [unit * change.detach() for unit, change in zip(self._units, self.changes, strict=True)]
        if self._middle:
            moves[1] -= self._middle * moves[0]
        for part, start, move in zip(self._parts, self._start, moves, strict=True):
            most = torch.finfo(part.dtype).max
            value = (start + move).clamp(0.0 if part.name in self.fmt.never_negative else -most, most)
            self._bytes_of(part).copy_(value.to(part.dtype)[:, None].view(torch.uint8))

    def take_gradient(self) -> None:
        """The changes have their gradients from `product`."""

    def stored(self) -> list[Tensor]:
        return [self._bytes_of(part).clone() for part in self._parts]

    def put_back(self, stored: list[Tensor]) -> None:
        for part, values in zip(self._parts, stored, strict=True):
            self._bytes_of(part).copy_(values)

    def _bytes_of(self, part: Part) -> Tensor:
        return self._blocks()[:, part.offset : part.offset + part.nbytes]

    # ---- forward and backward ----------------------------------------------------------------------------------------

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W' + bias, `[..., K]` -> `[..., N]`, with gradients in x and in the changes."""
        y: Tensor = _Product.apply(x, bias, self, *self.changes)  # type: ignore[no-untyped-call]
        return y

    def backward(self, x: Tensor, dy: Tensor, wants_dx: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients in x and in the changes, from that in the product.

        Args:
            x: `[T, K]`.
            dy: `[T, N]`, in the type of x.
            wants_dx: whether the gradient in x is wanted.
        """
        rows, columns = len(self.packed), x.shape[1]
        step = max(1, _CHUNK // columns)
        dx = torch.zeros_like(x) if wants_dx else None
        slopes: list[list[Tensor]] = [[] for _ in self._parts]
        for start in range(0, rows, step):
            some, part_dy = self.packed[start : start + step], dy[:, start : start + step]
            fields = self.fmt.unpack(some.reshape(-1, self.fmt.block_bytes))
            leaves = [fields[part.name].float().requires_grad_() for part in self._parts]
            with torch.enable_grad():
                names = (part.name for part in self._parts)
                w = self.fmt.decode({**fields, **dict(zip(names, leaves, strict=True))}).view(len(some), columns)
            dw = (part_dy.t() @ x).to(w.dtype)
            for found, slope in zip(slopes, torch.autograd.grad(w, leaves, dw), strict=True):
                found.append(slope)
            if dx is not None:
                dx += part_dy @ w.detach().to(dy.dtype)
        total = [torch.cat(each) for each in slopes]
        if self._middle:
            total[0] = total[0] - self._middle * total[1]
        return dx, [slope * unit for slope, unit in zip(total, self._units, strict=True)]


class _Product(torch.autograd.Function):
    """The product with a packed weight, by the kernels, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, scales: Scales, *changes: Tensor) -> Tensor:
        ctx.scales = scales
        ctx.save_for_backward(x)
        y: Tensor
        if x.dtype in FLOAT_DTYPES:
            y = torch.ops.isqtorch.linear_frozen(x, scales.packed, scales.fmt.name, bias)
            return y
        w = torch.ops.isqtorch.dequantize(scales.packed, scales.fmt.name, torch.float32).to(x.dtype)
        y = nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (dy,) = ctx.saved_tensors, dys
        dx, changes = ctx.scales.backward(x.flatten(0, -2), dy.flatten(0, -2), ctx.needs_input_grad[0])
        return (None if dx is None else dx.view_as(x), None, None, *changes)


class Vector:
    """A vector of a norm. Its unit is its mean absolute value, or 1 if it is zero: biases often begin so.

    Attributes:
        parameter: `[n]`, of any float type. It must want a gradient.
        changes: one, f32 `[n]`.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self._start = parameter.detach().float().clone()
        size = self._start.abs().mean()
        self._unit = torch.where(size > 0, size, 1.0)
        self.changes = [torch.zeros_like(self._start).requires_grad_()]

    def write(self) -> None:
        self._values().copy_(self._start + self._unit * self.changes[0].detach())

    def stored(self) -> list[Tensor]:
        return [self._values().clone()]

    def put_back(self, stored: list[Tensor]) -> None:
        self._values().copy_(stored[0])

    def take_gradient(self) -> None:
        slope, self.parameter.grad = self.parameter.grad, None
        if slope is not None:
            self.changes[0].grad = slope.float() * self._unit

    def _values(self) -> Tensor:
        return self.parameter.detach()
