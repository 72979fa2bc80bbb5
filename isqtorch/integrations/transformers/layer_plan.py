"""How one decoder layer computes a token with the operators of a decoding step, and what must hold for it."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from isqtorch.modules.linear import QuantLinear
from isqtorch.modules.parameter import PackedParameter

from .cache import growing_layer
from .known_layers import is_known_attention, is_known_decoder, is_known_mlp
from .norms import NO_NORM, NormKind, Norms

_step_norm = torch.ops.isqtorch.step_norm.default._op
_step_linears = torch.ops.isqtorch.step_linears.default._op
_step_linear_add = torch.ops.isqtorch.step_linear_add.default._op
_step_heads = torch.ops.isqtorch.step_heads.default._op
_step_attend = torch.ops.isqtorch.step_attend.default._op
_step_attention = torch.ops.isqtorch.step_attention.default._op
_step_mlp = torch.ops.isqtorch.step_mlp.default._op

CACHES = ("cache", "past_key_values")
"""Names of the argument that is the cache: since transformers 5.24, and before."""

_ARGUMENTS = frozenset(
    {"attention_mask", "position_ids", "use_cache", "position_embeddings", "cache_position", *CACHES}
)
_IMPLEMENTATIONS = ("sdpa", "eager")
"""Functions of attention that a plan can stand for."""

_OF_THE_SERVER = "isqtorch-rows-"
"""Begin of the names of functions that a plan can call only: they hide padding themselves, so there is no mask."""

_SILU_AT_ONCE = 1 << 15  # torch computes more values in several threads, and those at the borders with another exp
_SILU_WIDTH = 32


class Unsuitable(Exception):
    """Why a layer stays as it is, for the report."""


@dataclass
class Conditions:
    """What a plan assumes of the modules, checked in microseconds at each call: parts, parameters, hooks."""

    dicts: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def add(self, where: dict[str, Any], key: str) -> None:
        """Assume that an entry stays the same object."""
        self.dicts.append(where)
        self.keys.append(key)
        self.values.append(where.get(key))

    def add_module(self, module: nn.Module, own_forward: bool = False) -> None:
        """Assume that a module's parts, parameters, mode and forward stay, and that it has no hooks.

        Args:
            module: the module.
            own_forward: the plan is behind this module's own forward, whose hooks are called as before.
        """
        state = vars(module)
        for entries in (module._modules, module._parameters):
            for name in entries:
                self.add(entries, name)
        for name in ("training", "format") if own_forward else ("training", "format", "forward"):
            self.add(state, name)
        if not own_forward:
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]

    def hold(self) -> bool:
        """Whether everything is as it was."""
        return all(map(operator.is_, map(dict.get, self.dicts, self.keys), self.values))

    def hooked(self) -> bool:
        """Whether a module has got a hook, which a plan would not call."""
        return any(self.hooks)


@dataclass
class Norm:
    """A norm within an operator; without a weight there is none."""

    weight: Tensor | None = None
    kind: NormKind = NO_NORM

    @property
    def rule(self) -> tuple[float, int, int]:
        """The arguments behind the weight."""
        return self.kind.eps, self.kind.style, self.kind.lanes


class Linears:
    """Packed layers with the same input."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._weights: list[PackedParameter] = []
        self.formats: list[str] = []
        self.biases: list[Tensor | None] = []
        for module in modules:
            weight = module._parameters.get("weight")
            if type(module) is not QuantLinear or type(weight) is not PackedParameter:
                raise Unsuitable(f"{type(module).__name__} is not packed")
            self._weights.append(weight)
            self.formats.append(module.format)
            self.biases.append(module._parameters["bias"])

    @property
    def weights(self) -> list[Tensor]:
        """The bytes; they move when the model moves."""
        return [weight.plain for weight in self._weights]


class LayerPlan:
    """A decoder layer whose parts are known.

    Attributes:
        in_parts: of the class: call an operator for each part, also where one computes half of a layer. The bits are
            the same; it takes longer. The profile of a token needs it.

    Args:
        layer: the decoder layer.
        norms: finds the kinds of norms.
        dtype: type of the hidden states.

    Raises:
        Unsuitable: the layer has other parts, or parts that are not packed.
    """

    in_parts = False

    def __init__(self, layer: nn.Module, norms: Norms, dtype: torch.dtype, conditions: Conditions) -> None:
        self.dtype = dtype
        conditions.add_module(layer, own_forward=True)
        parts = layer._modules
        attention, mlp = parts.get("self_attn"), parts.get("mlp")
        if not is_known_decoder(type(layer)) or attention is None or mlp is None:
            raise Unsuitable(f"{type(layer).__name__} is no known kind of decoder layer")
        if not is_known_attention(type(attention)):
            raise Unsuitable(f"{type(attention).__name__} is no known kind of attention")
        # An MLP of another kind is called as a module; what is in it is its own affair.
        replaced = [
            part for name, part in parts.items() if part is not None and (name != "mlp" or is_known_mlp(type(mlp)))
        ]
        inside = [module for part in replaced for module in part.modules()]
        for module in inside:
            conditions.add_module(module)
        for module in (layer, *inside):
            if module.training:
                raise Unsuitable("it is in training mode")
            if module is not layer and "forward" in vars(module) and not is_norm_forward(module):
                raise Unsuitable(f"{type(module).__name__} has a forward of its own")
        self._norms = norms
        self._attention_parts(attention, conditions)
        self._mlp_parts(mlp)
        before, after = parts.get("input_layernorm"), parts.get("post_attention_layernorm")
        self.first, second = self._norm(before), self._norm(after)
        if "pre_feedforward_layernorm" in parts:  # Gemma: norms before and after each half
            self.after_attention, self.second = second, self._norm(parts["pre_feedforward_layernorm"])
            self.after_mlp = self._norm(parts.get("post_feedforward_layernorm"))
        else:
            self.after_attention, self.second, self.after_mlp = Norm(), second, Norm()

    def _attention_parts(self, attention: Any, conditions: Conditions) -> None:
        parts = attention._modules
        self.attention = attention
        self.index: int = attention.layer_idx
        self.scale = float(attention.scaling)
        names = ["qkv_proj"] if "qkv_proj" in parts else ["q_proj", "k_proj", "v_proj"]
        self.qkv, self.o = Linears([parts[name] for name in names]), Linears([parts["o_proj"]])
        self.q_norm, self.k_norm = (
            self._norm(parts[name]) if name in parts else Norm() for name in ("q_norm", "k_norm")
        )
        if self.q_norm.kind != self.k_norm.kind:
            raise Unsuitable("the norms of queries and keys are of two kinds")
        config = attention.config
        conditions.add(vars(config), "_attn_implementation_internal")
        implementation = config._attn_implementation
        self._own_attention = implementation in _IMPLEMENTATIONS
        if not self._own_attention and not implementation.startswith(_OF_THE_SERVER):
            raise Unsuitable(f"its attention is computed by {implementation!r}")
        self._usual_attention: Callable[..., Any] = _function(attention, implementation)
        self.dim: int = attention.head_dim
        self.kv_heads: int = config.num_key_value_heads

    def _mlp_parts(self, mlp: Any) -> None:
        self.mlp, self.inner, self._silu = mlp, 0, False
        self.gate_up: Linears | None = None
        self.down: Linears | None = None
        self.activation: Any = None
        parts = mlp._modules
        if not is_known_mlp(type(mlp)) or type(parts.get("down_proj")) is not QuantLinear:
            return
        names = ["gate_up_proj"] if "gate_up_proj" in parts else ["gate_proj", "up_proj"]
        if any(type(parts[name]) is not QuantLinear for name in names):
            return
        self.gate_up = Linears([parts[name] for name in names])
        self.down = Linears([parts["down_proj"]])
        self.activation = parts.get("act_fn") or parts.get("activation_fn")
        self.inner = parts["down_proj"].in_features
        self._silu = type(self.activation) is nn.SiLU or type(self.activation).__name__ == "SiLUActivation"
        self._silu = self._silu and self.inner % _SILU_WIDTH == 0 and _silu_has_the_bits_of_torch(self.dtype)

    def _norm(self, module: Any) -> Norm:
        kind = None if module is None else self._norms.kind(module)
        if kind is None or module.weight.dtype is not self.dtype:
            raise Unsuitable(f"{type(module).__name__} is no norm that the operators compute with the same bits")
        return Norm(module.weight, kind)

    def run(self, x: Tensor, cache: Any, arguments: dict[str, Any], usual_attention: bool) -> Tensor | None:
        """Compute a token of each sequence.

        Args:
            x: `[B, 1, K]`.
            cache: the model's cache; the token is added to it.
            arguments: the other keyword arguments of the layer's forward.
            usual_attention: use the function of attention that the model uses, which gives the same bits.

        Returns:
            `[B, 1, K]`, or None: the arguments ask for something else. Nothing has changed then.
        """
        if not arguments.keys() <= _ARGUMENTS and any(arguments[name] for name in arguments.keys() - _ARGUMENTS):
            return None
        angles, mask = arguments.get("position_embeddings"), arguments.get("attention_mask")
        if type(angles) is not tuple or angles[0].dtype is not self.dtype or not x.is_cpu:
            return None
        layer = growing_layer(cache, self.index)
        store = None if layer is None else layer.reserve(x.shape[0], self.kv_heads, self.dim, self.dtype)
        if layer is None or store is None:
            return None
        keys, values, first, last = store.keys, store.values, store.first, store.last + 1
        own = not usual_attention and self._own_attention and _is_mask(mask, x.shape[0], last - first)
        qkv, o, before, after = self.qkv, self.o, self.first, self.after_attention
        if own and not self.in_parts:
            x = _step_attention(
                *(x, qkv.weights, qkv.formats, qkv.biases, before.weight, *before.rule, *angles, keys, values),
                *(first, last, self.q_norm.weight, self.k_norm.weight, *self.q_norm.rule, self.scale, mask),
                *(o.weights[0], o.formats[0], o.biases[0], after.weight, *after.rule),
            )
            layer.commit()
            return self._run_mlp(x)
        heads = _step_linears(x, qkv.weights, qkv.formats, qkv.biases, before.weight, *before.rule, False)
        norms = self.q_norm.weight, self.k_norm.weight, *self.q_norm.rule
        q = _step_heads(heads, *angles, keys, values, last - 1, *norms)
        layer.commit()
        if own:
            y = _step_attend(q, keys, values, first, last, self.scale, mask)
        else:
            seen = keys[:, :, first:last], values[:, :, first:last]
            y, _ = self._usual_attention(self.attention, q, *seen, mask, dropout=0.0, scaling=self.scale)
            y = y.reshape(x.shape[0], 1, -1)
        x = _step_linear_add(y, o.weights[0], o.formats[0], o.biases[0], x, after.weight, *after.rule)
        return self._run_mlp(x)

    def _run_mlp(self, x: Tensor) -> Tensor:
        second, after, gate_up, down = self.second, self.after_mlp, self.gate_up, self.down
        result: Tensor
        if gate_up is None or down is None:
            y = self.mlp(_step_norm(x, second.weight, *second.rule))
            if after.weight is not None:
                y = _step_norm(y, after.weight, *after.rule)
            result = x + y
            return result
        silu = self._silu and (self.dtype is not torch.float32 or x.shape[0] * self.inner <= _SILU_AT_ONCE)
        if silu and not self.in_parts:
            result = _step_mlp(
                *(x, gate_up.weights, gate_up.formats, gate_up.biases, second.weight, *second.rule),
                *(down.weights[0], down.formats[0], down.biases[0], after.weight, *after.rule),
            )
            return result
        y = _step_linears(x, gate_up.weights, gate_up.formats, gate_up.biases, second.weight, *second.rule, silu)
        if not silu:
            gate, up = y.split(self.inner, dim=-1)
            y = self.activation(gate.contiguous()) * up
        result = _step_linear_add(y, down.weights[0], down.formats[0], down.biases[0], x, after.weight, *after.rule)
        return result


def is_norm_forward(module: nn.Module) -> bool:
    """Whether the forward of a module is a replacement for a norm that gives the same bits."""
    return getattr(vars(module).get("forward"), "gives_same_bits", False)


def _is_mask(mask: Any, batch: int, columns: int) -> bool:
    """Whether the operator of attention takes a mask."""
    return mask is None or (
        mask.dtype is torch.bool and tuple(mask.shape) in ((batch, 1, 1, columns), (1, 1, 1, columns))
    )


def _function(attention: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that a model's own code would call."""
    own = sys.modules[type(attention).__module__]
    function: Callable[..., Any] = own.ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, own.eager_attention_forward
    )
    return function


_SILU: dict[torch.dtype, bool] = {}


def _silu_has_the_bits_of_torch(dtype: torch.dtype) -> bool:
    """Whether the operator's SiLU gives the same bits as this build of torch, tried once on a line of numbers."""
    if dtype not in _SILU:
        x = torch.linspace(-110.0, 110.0, _SILU_AT_ONCE).to(dtype)
        made = torch.ops.isqtorch.step_gate(torch.cat((x, torch.ones_like(x))))
        _SILU[dtype] = torch.equal(made, functional.silu(x))
    return _SILU[dtype]
