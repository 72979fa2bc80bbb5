"""The activations of vLLM's mixtures of experts, in plain torch: vLLM's own kernels are not there on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_LIMIT, _ALPHA = 7.0, 1.702  # constants of gpt-oss and Step
_SINGLE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
NAMES = (
    *_SINGLE,
    *(f"{name}_no_mul" for name in _SINGLE),
    "swigluoai",
    "swigluoai_uninterleave",
    "swiglustep",
    "situ",
)


@dataclass(frozen=True)
class Settings:
    """Numbers that some activations have.

    Attributes:
        limit: SwiGLU: the gate is at most this, and the other half at most this far from zero; None: no limit.
        alpha: SwiGLU: factor of the gate within its sigmoid.
        beta: SwiGLU: added to the other half.
        situ_beta: SiTU: the bound of the gate.
        situ_linear_beta: SiTU: the bound of the other half; None: no bound.
    """

    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    situ_beta: float | None = None
    situ_linear_beta: float | None = None


def activated(name: str, x: Tensor, settings: Settings) -> Tensor:
    """Apply an activation.

    Args:
        name: vLLM's name of it, one of `NAMES`.
        x: `[rows, 2I]` with the gates in the first half (swigluoai: in the even columns); `[rows, I]` for "..._no_mul".
        settings: its numbers.

    Returns:
        `[rows, I]`.
    """
    if name.endswith("_no_mul"):
        return _SINGLE[name.removesuffix("_no_mul")](x)
    if name == "swigluoai":
        return _swiglu(x[..., ::2], x[..., 1::2], _LIMIT, _ALPHA, 1.0)
    gate, up = x.chunk(2, -1)
    if name == "swigluoai_uninterleave" or (name == "silu" and settings.limit is not None):
        plain = name == "silu"
        return _swiglu(gate, up, settings.limit, 1.0 if plain else settings.alpha, 0.0 if plain else settings.beta)
    if name == "swiglustep":
        return F.silu(gate).clamp(max=_LIMIT) * up.clamp(-_LIMIT, _LIMIT)
    if name == "situ":
        return _situ(gate.float(), up.float(), settings).to(x.dtype)
    return _SINGLE[name](gate) * up


def _swiglu(gate: Tensor, up: Tensor, limit: float | None, alpha: float, beta: float) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _situ(gate: Tensor, up: Tensor, settings: Settings) -> Tensor:
    bound, linear = settings.situ_beta or 1.0, settings.situ_linear_beta
    if linear is not None and linear > 0:
        up = linear * torch.tanh(up / linear)
    return bound * torch.tanh(gate / bound) * torch.sigmoid(gate) * up
