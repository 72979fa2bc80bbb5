"""Moments and weights for the tests of error feedback, and how large the errors are."""

from __future__ import annotations

import torch
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat
from isqtorch.quantizers import feedback_factor, scale_rule


def moments(columns: int, seed: int = 0, tokens: int = 1000) -> Tensor:
    """Second moments of correlated inputs of uneven size, one of which is always zero: f32 `[K, K]`."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
    x *= torch.rand(columns, generator=generator) + 0.1
    x[:, 5] = 0
    return x.t() @ x / tokens


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def loss(w: Tensor, packed: Tensor, fmt: QuantFormat, h: Tensor) -> float:
    """tr(D H D'), the mean squared error of the outputs, summed over them."""
    d = ops.dequantize(packed, fmt.name, torch.float32).double() - w.double()
    return float(((d @ h.double()) * d).sum())


def by_importance(w: Tensor, fmt: QuantFormat, h: Tensor) -> Tensor:
    return ops.quantize(w, fmt.name, h.diagonal().contiguous(), scale_rule(fmt))


def by_feedback(w: Tensor, fmt: QuantFormat, h: Tensor, factor: Tensor | None = None) -> Tensor:
    factor = feedback_factor(h) if factor is None else factor
    return ops.quantize_feedback(w, fmt.name, factor, h.diagonal().contiguous(), scale_rule(fmt))


def ratio(w: Tensor, fmt: QuantFormat, h: Tensor, factor: Tensor | None = None) -> float:
    """How large the loss is with feedback, as a share of that by importance alone."""
    return loss(w, by_feedback(w, fmt, h, factor), fmt, h) / loss(w, by_importance(w, fmt, h), fmt, h)


def columns_for(fmt: QuantFormat) -> int:
    return max(2 * fmt.block, 256)
