"""QuantExperts: the fused experts of a mixture-of-experts layer, over packed weights.

A transformers model keeps the experts of a layer in stacks of matrices, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
Sixty-odd classes do so in the same way, which flags on the instance describe (transformers' `use_experts_implementation`
sets them); this module takes the place of any of them. Classes with a way of their own are below, known by name. Neither
needs transformers to be imported.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from isqtorch.formats import QuantFormat, get_format

from .packed import PackedModule
from .parameter import plain_bytes

_experts_linear = torch.ops.isqtorch.experts_linear.default

# What `use_experts_implementation` leaves on an instance.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel")
_OWN = ("formats", "dtype", "origin", "origin_requires_grad", "transposed")  # attributes that the original lacks


class QuantExperts(PackedModule):
    """Experts with packed stacks of matrices under their original names; everything else is the original's.

    Made by `from_float` and filled by `put`; the matrices that are not packed yet are the original's, and it does not run
    before all are.

    Attributes:
        formats: {name of a stack: format}; each is uint8 `[E, N, row_bytes]`.
        transposed: whether the original stores `[E, K, N]`.
        origin: the class this module replaced, whose `_apply_gate` it uses.
    """

    formats: dict[str, str]
    transposed: bool
    gate_up_proj: Tensor
    down_proj: Tensor
    has_gate: bool = True
    has_bias: bool = False
    has_post_expert_norm: bool = False

    @classmethod
    def from_float(cls, experts: nn.Module) -> QuantExperts:
        """The module in the place of `experts`, with the same parameters, hooks and attributes, none of them packed yet."""
        kind = experts_class(experts)
        if kind is None:
            raise ValueError(f"QuantExperts.from_float: {type(experts).__name__} is not a known kind of fused experts")
        new = kind.__new__(kind)
        new.__dict__.update(_copied(experts))
        new.formats = {}
        new.origin = type(experts)
        new.transposed = kind._is_transposed(experts)
        first = next(iter(stacks(experts).values()))
        new.dtype, new.origin_requires_grad = first.dtype, first.requires_grad
        return new

    @classmethod
    def _is_transposed(cls, experts: nn.Module) -> bool:
        return bool(getattr(experts, "is_transposed", False))

    def _is_turned(self) -> bool:
        return self.transposed

    @property
    def packed(self) -> dict[str, str]:
        return self.formats

    def put(self, name: str, packed: nn.Parameter, fmt: QuantFormat) -> None:
        """Take uint8 `[E, N, row_bytes]` for the stack `name`."""
        self.register_parameter(name, packed)
        self.formats[name] = fmt.name

    def twin(self) -> QuantExperts:
        """Another module over the same tensors, whose stacks `put` may replace without this one noticing."""
        new = type(self).__new__(type(self))
        new.__dict__.update(_copied(self))
        for name in self.formats:
            new.register_parameter(name, self._parameters[name])
        return new

    def to_float(self, weights: dict[str, nn.Parameter]) -> nn.Module:
        """The module that this one replaced, around float stacks in its own layout."""
        new = self.origin.__new__(self.origin)
        new.__dict__.update({name: value for name, value in _copied(self).items() if name not in _OWN})
        new._parameters.update(weights)
        return new

    # ---- computing ---------------------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' own implementations.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: the experts of each token, `[T, S]`; E for one that is on another rank.
            top_k_weights: what their results count, `[T, S]`.

        Returns:
            `[T, H]`, of the type of `hidden_states`.
        """
        y = self._experts(hidden_states, top_k_index)
        return (y * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _experts(self, x: Tensor, ids: Tensor) -> Tensor:
        """What each token's experts make of it: x `[T, H]` or `[T, S, H]`, ids `[T, S]` -> `[T, S, H]`."""
        up = self._multiply("gate_up_proj" if self.has_gate else "up_proj", x, ids).flatten(0, 1)  # [T * S, 2I or I]
        hidden = self._gate(up) if self.has_gate else cast(Any, self).act_fn(up)
        y = self._multiply("down_proj", hidden.view(*ids.shape, -1), ids)
        return cast(Tensor, cast(Any, self).post_expert_norm(y)) if self.has_post_expert_norm else y

    def _gate(self, gate_up: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.origin)._apply_gate(self, gate_up))

    def _multiply(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        if name not in self.formats:
            raise RuntimeError(
                f"{type(self).__name__}: {name} is not packed, because quantize_ was interrupted. Quantize the model again."
            )
        if forward_ad._current_level >= 0:  # forward mode would take the operator's derivative for zero
            raise NotImplementedError(
                f"{type(self).__name__}: {name} is packed, and experts have no forward-mode derivative. Use reverse mode (backward)."
            )
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        y: Tensor = _experts_linear(x, plain_bytes(getattr(self, name)), self.formats[name], ids, bias)
        return y

    def extra_repr(self) -> str:
        parts = []
        for name, format in self.formats.items():
            fmt, (experts, rows, row_bytes) = get_format(format), cast(Tensor, self._parameters[name]).shape
            parts.append(
                f"{name}=[{experts}, {rows}, {fmt.in_features(row_bytes)}] {format} {fmt.bits_per_weight:.2f} bpw"
            )
        return ", ".join(parts)


class QuantLlama4Experts(QuantExperts):
    """Llama 4: every expert gets every token, already scaled by its router score; most of these rows are zeros."""

    @classmethod
    def _is_transposed(cls, experts: nn.Module) -> bool:
        return True

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """`[E * T, H]`, the tokens of the first expert first -> the same shape. Rows of zeros stay so, without work."""
        experts = self.gate_up_proj.shape[0]
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        ids = torch.arange(experts, device=rows.device).repeat_interleave(rows.shape[0] // experts)
        ids = torch.where((rows == 0).all(-1), experts, ids)
        return self._experts(rows, ids[:, None]).view(rows.shape[0], -1)

    def _gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return cast(Tensor, up * cast(Any, self).act_fn(gate))


class QuantLongcatExperts(QuantExperts):
    """LongCat Flash: experts behind the last one with weights pass their input on."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = self.down_proj.shape[0]
        idle = top_k_index >= experts
        y = self._experts(hidden_states, torch.where(idle, experts, top_k_index))
        y = torch.where(idle[..., None], hidden_states[:, None], y)
        return (y * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _multiply(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        experts = getattr(self, name).shape[0]  # gate_up_proj has rows for the idle ones, too, which nobody uses
        return super()._multiply(name, x, torch.where(ids >= self.down_proj.shape[0], experts, ids))

    def _gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return cast(Tensor, cast(Any, self).act_fn(gate) * up)


class QuantParallelExperts(QuantExperts):
    """JetMoe: one stack of matrices, and rows of x that are sorted by expert."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:  # type: ignore[override]
        """`[rows, K]`, of which the first `expert_size[0]` are for the first expert -> `[rows, N]`."""
        sizes = torch.tensor(expert_size, device=inputs.device)
        ids = torch.arange(len(expert_size), device=inputs.device).repeat_interleave(sizes)
        return self._multiply("weight", inputs, ids[:, None]).flatten(0, 1)


_BY_NAME: dict[str, type[QuantExperts]] = {
    "JetMoeParallelExperts": QuantParallelExperts,
    "Llama4TextExperts": QuantLlama4Experts,
    "LongcatFlashExperts": QuantLongcatExperts,
    "Step3p7Experts": QuantExperts,  # as the others, but without the flags
}


def experts_class(module: nn.Module) -> type[QuantExperts] | None:
    """The packed counterpart of a module, if it holds fused experts that we know how to run."""
    cls = type(module)
    if cls.__name__ in _BY_NAME and cls.__module__.startswith("transformers.models."):
        return _BY_NAME[cls.__name__] if stacks(module) else None
    if not all(flag in vars(module) for flag in _FLAGS) or not hasattr(module, "_apply_gate"):
        return None
    wanted = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    return QuantExperts if set(stacks(module)) == wanted else None


def stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that are stacks of matrices."""
    return {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}


def _copied(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, for another one to own: its dicts are copies, their members the same objects."""
    return {name: value.copy() if type(value) is dict else value for name, value in vars(module).items()}
