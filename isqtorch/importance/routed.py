"""Observe the inputs of fused experts: the rows that go into each stack of matrices, and their experts.

In packed experts, all rows go through `QuantExperts._multiply`, which is wrapped. Float experts need a trick.
transformers 5 keeps the experts of a layer in one module with weights `[E, N, K]`, whose forward is one of several
implementations. The implementation "grouped_mm" sorts the rows by expert. Between its two products it calls
`_apply_gate` (or `act_fn`), whose result is the input of the second product. So the config is switched to "grouped_mm"
inside the block, and this call is wrapped.

This breaks if transformers changes the order of the rows or the call between the products; test_fused_experts in
tests/test_calibration_experts.py compares all sums with a loop over experts and notices it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from isqtorch.formats import get_format
from isqtorch.modules import PackedModule, QuantExperts


@dataclass(frozen=True)
class Routing:
    """Where the rows of an input go.

    Attributes:
        experts: the experts of each row, `[S]` or `[S, top_k]`.
        order: where a token has several rows: for each row, `times` times the number of its token plus less than that,
            int64 `[S]`. None: the rows are the tokens, or it is not known which tokens they are.
        times: rows per token.
    """

    experts: Tensor
    order: Tensor | None = None
    times: int = 1


Observer = Callable[[str, Tensor, Routing], None]
"""A callback, called with the name of a weight, its input rows `[S, K]`, and their experts."""


class RoutedExperts(Protocol):
    """A module with fused experts.

    Attributes:
        experts: E, the number of experts.
        columns: {name of a stack of matrices: its K}.
    """

    experts: int
    columns: dict[str, int]

    def observed(self, observer: Observer) -> AbstractContextManager[None]:
        """Call `observer` with every input of the matrices inside this block."""
        ...


class PackedExperts:
    """The packed stacks of a QuantExperts."""

    def __init__(self, module: QuantExperts) -> None:
        self._module = module
        stacks = {leaf: cast(Tensor, module._parameters[leaf]) for leaf in module.formats}
        self.experts = next(iter(stacks.values())).shape[0]
        self.columns = {
            leaf: get_format(module.formats[leaf]).in_features(stack.shape[2]) for leaf, stack in stacks.items()
        }

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        multiply = self._module._multiply

        def watched(name: str, x: Tensor, ids: Tensor) -> Tensor:
            if x.ndim == 2:
                observer(name, x, Routing(ids))
            else:
                rows = torch.arange(ids.numel(), device=ids.device)
                observer(name, x.reshape(-1, x.shape[-1]), Routing(ids.reshape(-1), rows, ids.shape[-1]))
            return multiply(name, x, ids)

        vars(self._module)["_multiply"] = watched
        try:
            yield
        finally:
            del vars(self._module)["_multiply"]


class FloatExperts:
    """Float experts of a class that transformers decorates with `use_experts_implementation`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._first = "gate_up_proj" if module.has_gate else "up_proj"
        down = module.down_proj
        self.experts: int = down.shape[0]
        at = 1 if module.is_transposed else 2  # [E, K, N] or [E, N, K]
        self.columns = {leaf: int(getattr(module, leaf).shape[at]) for leaf in (self._first, "down_proj")}

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        module, routing = self._module, threading.local()

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
            x, chosen = named["hidden_states"], named["top_k_index"]
            chosen = chosen.reshape(-1, chosen.shape[-1])
            routing.sorted = Routing(*torch.sort(chosen.reshape(-1)), chosen.shape[-1])  # of the second product
            observer(self._first, x.reshape(-1, x.shape[-1]), Routing(chosen))

        def between(x: Tensor) -> None:
            observer("down_proj", x, routing.sorted)

        handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        # The layers of a model share the config. If it is not restored, the model stays on "grouped_mm";
        # test_hooks_are_gone_afterwards_also_after_an_error in tests/test_calibration.py notices this.
        config, asked = module.config, module.config._experts_implementation
        try:
            config._experts_implementation = "grouped_mm"
            if module.has_gate:
                gate = module._apply_gate

                def apply_gate(x: Tensor) -> Tensor:
                    out: Tensor = gate(x)
                    between(out)
                    return out

                module._apply_gate = apply_gate
            else:
                handles.append(module.act_fn.register_forward_hook(lambda _, args, out: between(out)))
            yield
        finally:
            config._experts_implementation = asked
            vars(module).pop("_apply_gate", None)
            for handle in handles:
                handle.remove()


def find_routed_experts(model: nn.Module) -> Iterator[tuple[str, RoutedExperts]]:
    """Yield (path, experts) for each module of a model with fused experts of a known kind."""
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts) and module.formats:
            yield name, PackedExperts(module)
        # attributes that use_experts_implementation of transformers sets
        marks = ("has_gate", "is_transposed", "_apply_gate", "config")
        weight = module._parameters.get("down_proj")
        if isinstance(module, PackedModule) or weight is None or weight.ndim != 3:
            continue
        if all(hasattr(module, mark) for mark in marks):
            yield name, FloatExperts(module)
