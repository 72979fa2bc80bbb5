"""Decoding on a CPU with few operators: replaces the forward of decoder layers and norms, and takes that back.

A replaced forward computes one token of each sequence without gradients. Everything else, and everything that its plan
does not know, goes to the layer's own forward. So does a layer whose parts were changed, until they can be planned
again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.running import evaluating

from .layer_plan import CACHES, Conditions, LayerPlan, Unsuitable
from .norms import Norms

_step_norm = torch.ops.isqtorch.step_norm.default._op
_is_compiling, _functorch_is_active = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_TRIED_TOKENS = 6
_TOLERANCE = 0.02  # of a layer's output, with our order of sums in attention: products round their input to 8 bits


def _plain_call() -> bool:
    """Whether nothing observes or changes the operators that are called: gradients, autocast, torch.func."""
    return not (torch.is_grad_enabled() or torch._C._is_any_autocast_enabled() or _functorch_is_active())


class NormForward:
    """The forward of a norm: one operator with the same bits."""

    gives_same_bits = True

    def __init__(self, module: nn.Module, norms: Norms) -> None:
        self._module, self._norms = module, norms

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (_is_compiling() or args or kwargs) and _plain_call():
            weight = self._module._parameters.get("weight")
            kind = None if weight is None or weight.dtype is not x.dtype else self._norms.kind(self._module)
            if kind is not None and x.is_cpu:
                return _step_norm(x, weight, kind.eps, kind.style, kind.lanes)
        return type(self._module).forward(self._module, x, *args, **kwargs)


class LayerForward:
    """The forward of a decoder layer: a plan for one token, else the layer's own.

    Attributes:
        why_not: why there is no plan at present; None: there is one.
        trial: the faults that a comparison with the layer's own forward found; None: it is not tried.
        tries: how often it was compared.
    """

    def __init__(self, layer: nn.Module, norms: Norms, exact: bool | None) -> None:
        self._layer, self._norms, self._exact = layer, norms, exact
        self._state: tuple[Conditions, LayerPlan | None] | None = None  # one object: several threads may generate
        self.why_not: str | None = None
        self.trial: list[str] | None = None
        self.tries = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan, which holds parts of the modules that a copy replaces."""
        return {**vars(self), "_state": None}

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling() or args or hidden_states.ndim != 3 or hidden_states.shape[1] != 1 or not _plain_call():
            return self._usual(hidden_states, *args, **kwargs)
        cache = next((kwargs[name] for name in CACHES if name in kwargs), None)
        if cache is None:
            return self._usual(hidden_states, **kwargs)
        conditions, plan = self.planned(hidden_states.dtype)
        if plan is None or conditions.hooked():
            return self._usual(hidden_states, **kwargs)
        if self.trial is not None:
            return self._tried(plan, hidden_states, cache, kwargs)
        exact = self._exact if self._exact is not None else plan.dtype is torch.float32
        out = plan.run(hidden_states, cache, kwargs, exact)
        return self._usual(hidden_states, **kwargs) if out is None else out

    def planned(self, dtype: torch.dtype) -> tuple[Conditions, LayerPlan | None]:
        """Return the plan and its conditions, made anew if the layer has changed. `why_not` says why there is none."""
        state = self._state
        if state is None or not state[0].hold() or (state[1] is not None and state[1].dtype is not dtype):
            conditions, plan = Conditions(), None
            try:
                plan, self.why_not = LayerPlan(self._layer, self._norms, dtype, conditions), None
            except Unsuitable as why:
                self.why_not = str(why)
            self._state = state = conditions, plan
        return state

    def _usual(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._layer).forward(self._layer, *args, **kwargs)

    def _tried(self, plan: LayerPlan, x: Tensor, cache: Any, arguments: dict[str, Any]) -> Any:
        """Return what the layer's own forward returns, and note what the plan does otherwise."""
        assert self.trial is not None
        self.tries += 1
        layers, index = cache.layers, plan.index
        before = copy.deepcopy(layers[index])
        expected = self._usual(x, **arguments)
        after = layers[index]
        for usual_attention in (True, False):
            layers[index] = copy.deepcopy(before)
            out = plan.run(x, cache, arguments, usual_attention)
            written = layers[index]
            if not isinstance(expected, Tensor) or out is None:
                self.trial.append("its forward takes or gives something else")
                break
            same_cache = torch.equal(written.keys, after.keys) and torch.equal(written.values, after.values)
            if usual_attention and not (same_cache and torch.equal(out, expected)):
                self.trial.append("a trial gave other bits than its own forward")
                break
            off = float((out - expected).float().norm() / expected.float().norm().clamp(min=1e-20))
            if not off < _TOLERANCE:
                self.trial.append(f"a trial was off by {off:.3g} with the attention of isqtorch")
        layers[index] = after
        return expected


def attach(model: nn.Module, exact: bool | None) -> tuple[int, dict[str, str]]:
    """Replace the forwards of a model's decoder layers and norms where a trial gives the same.

    Args:
        model: a model of transformers, on a CPU.
        exact: whether to use the model's own function of attention; None: in f32.

    Returns:
        How many layers are replaced; and the layers that stay as they are, with the reason.
    """
    norms = Norms()
    layers = {name: module for name, module in model.named_modules() if _may_be_layer(module)}
    kept: dict[str, str] = {}
    for module in model.modules():
        if "forward" not in vars(module) and norms.kind(module) is not None:
            vars(module)["forward"] = NormForward(module, norms)
    made = {}
    for name, layer in layers.items():
        if "forward" in vars(layer):
            kept[name] = "it has a forward of its own"
            continue
        forward = LayerForward(layer, norms, exact)
        with evaluating(layer):
            _, plan = forward.planned(_dtype_of(layer))
        if plan is None:
            kept[name] = str(forward.why_not)
        else:
            made[name] = forward
    for name, why in _tried(model, made).items():
        kept[name] = why
        del made[name]
    for name, forward in made.items():
        vars(layers[name])["forward"] = forward
    return len(made), kept


def detach(model: nn.Module) -> None:
    """Give all modules their own forwards back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), (NormForward, LayerForward)):
            del vars(module)["forward"]


def _may_be_layer(module: nn.Module) -> bool:
    return {"self_attn", "mlp", "input_layernorm"} <= module._modules.keys()


def _dtype_of(layer: nn.Module) -> torch.dtype:
    norm = layer._modules["input_layernorm"]
    parameter = None if norm is None else next(norm.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype


def _tried(model: nn.Module, made: dict[str, LayerForward]) -> dict[str, str]:
    """Run a short text and one more token through the model, and compare each layer. Return the faults by layer."""
    if not made:
        return {}
    faults: dict[str, str] = {}
    with evaluating(model), _on_trial(made):
        try:
            vocabulary = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr,operator]
            ids = torch.arange(_TRIED_TOKENS).unsqueeze(0) * 7 % vocabulary
            out = model(input_ids=ids, use_cache=True)
            name = next(name for name in CACHES if getattr(out, name, None) is not None)
            model(input_ids=ids[:, :1], use_cache=True, **{name: getattr(out, name)})
        except Exception as error:  # a model may want other inputs, or fail: it stays as it is
            why = f"a trial failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return dict.fromkeys(made, why)
        for name, forward in made.items():
            if forward.trial or not forward.tries:
                faults[name] = "; ".join(forward.trial or []) or "it was not called in a trial"
    return faults


@contextmanager
def _on_trial(made: dict[str, LayerForward]) -> Iterator[None]:
    for forward in made.values():
        vars(forward._layer)["forward"] = forward
        forward.trial = []
    try:
        yield
    finally:
        for forward in made.values():
            del vars(forward._layer)["forward"]
            forward.trial = None
