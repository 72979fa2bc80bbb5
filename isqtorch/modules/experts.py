"""QuantExperts: the fused experts of a mixture-of-experts layer, with packed weights.

A transformers model keeps the experts of a layer in stacks of matrices, `gate_up_proj` [E, 2I, H] and `down_proj`
[E, H, I]. More than sixty classes do this in the same way. Flags on the instance, which `use_experts_implementation` of
transformers sets, describe the variants. QuantExperts can replace any of these classes. Subclasses of QuantExperts
replace other classes, which are recognized by name. transformers need not be imported for either.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from isqtorch.formats import QuantFormat, get_format

from .packed import FLOAT_DTYPES, PackedModule
from .parameter import plain_bytes

_experts_linear = torch.ops.isqtorch.experts_linear.default

# Attributes that `use_experts_implementation` sets on an instance. Versions before 5.23 do not set `has_post_expert_norm`.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel")
_OWN = ("formats", "dtype", "origin", "origin_requires_grad", "transposed")  # attributes that the original lacks


class QuantExperts(PackedModule):
    """The fused experts of a mixture-of-experts layer, with packed stacks of matrices under their original names.

    `quantize_` makes it. `from_float` makes it without packed stacks; each call of `put` sets one. Other attributes and
    stacks that are not packed yet are those of the replaced module. `forward` works only when all stacks are packed.

    Attributes:
        formats: {name of a stack: name of its format}; a packed stack is uint8 `[E, N, row_bytes]`.
        transposed: whether the replaced module stores its stacks as `[E, K, N]`.
        origin: the class of the replaced module, whose `_apply_gate` is used.

    Example:
        isqtorch.quantize_(mixture_of_experts_model, "q4k")
        experts = [m for m in mixture_of_experts_model.modules() if isinstance(m, isqtorch.QuantExperts)]
        print(experts[0].formats)  # {'gate_up_proj': 'q4k', 'down_proj': 'q4k'}
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
        """Make the module that replaces `experts`, with the same parameters, hooks and attributes. No stack is packed.

        Raises:
            ValueError: the class of `experts` is not known.
        """
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

    def is_turned(self) -> bool:
        return self.transposed

    @property
    def packed(self) -> dict[str, str]:
        """{name of a packed stack: name of its format}."""
        return self.formats

    def put(self, name: str, packed: nn.Parameter, fmt: QuantFormat) -> None:
        """Set the stack `name` to `packed`, uint8 `[E, N, row_bytes]` in format `fmt`."""
        self.register_parameter(name, packed)
        self.formats[name] = fmt.name

    def twin(self) -> QuantExperts:
        """Make another module with the same tensors. `put` on one of the two does not change the other."""
        new = type(self).__new__(type(self))
        new.__dict__.update(_copied(self))
        for name in self.formats:
            new.register_parameter(name, self._parameters[name])
        return new

    def to_float(self, weights: dict[str, nn.Parameter]) -> nn.Module:
        """Make the module that this one replaced, with the float stacks `weights` in that module's layout."""
        new = self.origin.__new__(self.origin)
        new.__dict__.update({name: value for name, value in _copied(self).items() if name not in _OWN})
        new._parameters.update(weights)
        return new

    # ---- computing ---------------------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the weighted sum of the experts' results, as transformers' implementations do.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: the experts of each token, `[T, S]`; E means an expert on another rank.
            top_k_weights: the weights of their results, `[T, S]`.

        Returns:
            `[T, H]`, of the type of `hidden_states`.
        """
        y = self._experts(hidden_states, top_k_index)
        return (y * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _experts(self, x: Tensor, ids: Tensor) -> Tensor:
        """Return the result of each expert of each token: x `[T, H]` or `[T, S, H]`, ids `[T, S]` -> `[T, S, H]`."""
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
        # The operator has no forward-mode derivative; torch would silently use zero. `_current_level` is private:
        # test_forward_mode_is_refused_rather_than_zero fails if its meaning changes.
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{type(self).__name__}: {name} is packed, and experts have no forward-mode derivative. Use reverse mode (backward)."
            )
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        weight, native = plain_bytes(getattr(self, name)), x.dtype if x.dtype in FLOAT_DTYPES else torch.float32
        if native is not x.dtype:  # after `.double()`: the products are those of float32
            bias = None if bias is None else bias.to(native)
        y: Tensor = _experts_linear(x.to(native), weight, self.formats[name], ids, bias)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        parts = []
        for name, format in self.formats.items():
            fmt, (experts, rows, row_bytes) = get_format(format), cast(Tensor, self._parameters[name]).shape
            parts.append(
                f"{name}=[{experts}, {rows}, {fmt.in_features(row_bytes)}] {format} {fmt.bits_per_weight:.2f} bpw"
            )
        return ", ".join(parts)


class QuantLlama4Experts(QuantExperts):
    """Llama 4: every expert gets every token, multiplied by its router score. Most of these rows are zeros."""

    @classmethod
    def _is_transposed(cls, experts: nn.Module) -> bool:
        return True

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Map `[E * T, H]`, sorted by expert, to the same shape. Rows of zeros give zeros and are not computed."""
        experts = self.gate_up_proj.shape[0]
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        ids = torch.arange(experts, device=rows.device).repeat_interleave(rows.shape[0] // experts)
        ids = torch.where((rows == 0).all(-1), experts, ids)
        return self._experts(rows, ids[:, None]).view(rows.shape[0], -1)

    def _gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return cast(Tensor, up * cast(Any, self).act_fn(gate))


class QuantLongcatExperts(QuantExperts):
    """LongCat Flash: experts with an index above the last one with weights are identities."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = self.down_proj.shape[0]
        idle = top_k_index >= experts
        y = self._experts(hidden_states, torch.where(idle, experts, top_k_index))
        y = torch.where(idle[..., None], hidden_states[:, None], y)
        return (y * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def _multiply(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        experts = getattr(self, name).shape[0]  # gate_up_proj also has unused matrices for the identity experts
        return super()._multiply(name, x, torch.where(ids >= self.down_proj.shape[0], experts, ids))

    def _gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return cast(Tensor, cast(Any, self).act_fn(gate) * up)


class QuantParallelExperts(QuantExperts):
    """JetMoe: one stack of matrices; the rows of x are sorted by expert."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:  # type: ignore[override]
        """Map `[rows, K]` to `[rows, N]`. The first `expert_size[0]` rows belong to the first expert, and so on."""
        sizes = torch.tensor(expert_size, device=inputs.device)
        ids = torch.arange(len(expert_size), device=inputs.device).repeat_interleave(sizes)
        return self._multiply("weight", inputs, ids[:, None]).flatten(0, 1)


class QuantSharedExperts(QuantExperts):
    """Inkling: every token goes through every shared expert, and their results are weighted before the last product."""

    gate_proj: Tensor
    up_proj: Tensor

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:  # type: ignore[override]
        """Map hidden states `[..., H]`, with the weights of the experts for each token, to the same shape."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts = self.down_proj.shape[0]
        ids = torch.arange(experts, device=x.device).expand(x.shape[0], experts)
        gate, up = (self._multiply(name, x, ids) for name in ("gate_proj", "up_proj"))  # [T, E, I]
        hidden = cast(Any, self).act_fn(gate) * up * gammas.reshape(-1, experts, 1)
        y = self._multiply("down_proj", hidden, ids)
        return y.float().sum(1).to(hidden_states.dtype).view(hidden_states.shape)


_BY_NAME: dict[str, type[QuantExperts]] = {
    "InklingSharedExperts": QuantSharedExperts,
    "JetMoeParallelExperts": QuantParallelExperts,
    "Llama4TextExperts": QuantLlama4Experts,
    "LongcatFlashExperts": QuantLongcatExperts,
    "Step3p7Experts": QuantExperts,  # like the classes with flags, but without the flags
}


def experts_class(module: nn.Module) -> type[QuantExperts] | None:
    """Return the packed counterpart of a module with fused experts, or None if it is not of a known kind."""
    cls = type(module)
    if cls.__name__ in _BY_NAME and cls.__module__.startswith("transformers.models."):
        return _BY_NAME[cls.__name__] if stacks(module) else None
    if not all(flag in vars(module) for flag in _FLAGS) or not hasattr(module, "_apply_gate"):
        return None
    wanted = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    return QuantExperts if set(stacks(module)) == wanted else None


def stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that are stacks of matrices."""
    return {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}


def _copied(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module for another module: dicts are copied, their values are the same objects."""
    return {name: value.copy() if type(value) is dict else value for name, value in vars(module).items()}
