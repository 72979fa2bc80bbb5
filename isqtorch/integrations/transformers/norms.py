"""RMS norms of a model: which of the operator's styles a module computes, found by trying."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.ops.steps import STYLES

_EPS = ("variance_epsilon", "eps", "epsilon")
_LANES = (8, 4, 16)
_TRIED_ROWS = 8


@dataclass(frozen=True)
class NormKind:
    """How a norm is computed: the arguments of the operators (`isqtorch.ops.steps`)."""

    eps: float
    style: int
    lanes: int


NO_NORM = NormKind(0.0, 0, 8)
"""For operators without a norm, which read none of it."""


class Norms:
    """Finds the kind of a norm, once for each class, size, and type."""

    def __init__(self) -> None:
        self._known: dict[Any, NormKind | None] = {}

    def kind(self, module: nn.Module) -> NormKind | None:
        """Return how a module computes its norm; None: it is no RMS norm, or it gives other bits than the operator."""
        weight = module._parameters.get("weight")
        eps = next((value for name in _EPS if isinstance(value := getattr(module, name, None), float)), None)
        if weight is None or eps is None or weight.ndim != 1 or weight.device.type != "cpu":
            return None
        if len(list(module.parameters())) != 1 or next(module.buffers(), None) is not None:
            return None
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return None
        key = (type(module), len(weight), weight.dtype, eps)
        if key not in self._known:
            self._known[key] = _tried(module, eps)
        return self._known[key]


def _tried(module: nn.Module, eps: float) -> NormKind | None:
    """Compare a copy of a module, with other weights, with the operator.

    Its own weights may be all the same, which would hide a difference.
    """
    probe: Any = copy.deepcopy(module)
    for name in [name for name in vars(probe) if name == "forward"]:
        del vars(probe)[name]  # a replacement, of the module and not of its copy
    generator = torch.Generator().manual_seed(0)
    shape, dtype = probe.weight.shape, probe.weight.dtype
    with torch.no_grad():
        weight = torch.randn(shape, generator=generator).to(dtype)
        probe.weight = nn.Parameter(weight, requires_grad=False)
        x = (3 * torch.randn((_TRIED_ROWS, *shape), generator=generator)).to(dtype)
        try:
            expected = probe(x)
        except Exception:  # whatever it is, it is no norm of rows
            return None
        if not isinstance(expected, Tensor) or expected.dtype != dtype:
            return None
        for style in range(len(STYLES)):
            for lanes in _LANES:
                if torch.equal(torch.ops.isqtorch.step_norm(x, weight, eps, style, lanes), expected):
                    return NormKind(eps, style, lanes)
    return None
