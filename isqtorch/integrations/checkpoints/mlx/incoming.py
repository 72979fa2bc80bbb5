"""The weights of an MLX folder, by the names of a transformers model's parameters.

A parameter is made of one weight of the files, or of several: MLX keeps the gate and up projections of experts apart,
and older folders keep every expert apart. The parts are rows of the parameter, so packed rows are joined as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from isqtorch.formats.affine import AffineFormat
from isqtorch.inplace.source import sampled
from isqtorch.integrations.checkpoints.incoming import Held, Incoming
from isqtorch.modules import PackedModule
from isqtorch.modules.convert import float_shape, matrices, upright

from .layouts import Layout, is_raised, renamed
from .weights import MlxWeights, Module, common_format

_EXPERT = re.compile(
    r"(?P<path>.*\.experts)\.(?:(?P<expert>\d+)\.)?(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<leaf>weight|bias)"
)
_STACK = re.compile(r"(?:\.experts)?\.switch_(?:mlp|glu)\.")
_ROLES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_COMPUTED = ("rotary_emb.inv_freq", "rope.inv_freq")  # in old files; the model computes them


@dataclass(frozen=True)
class _Target:
    """A parameter or saved buffer of the model."""

    shape: tuple[int, ...]  # of the float tensor
    turned: bool  # whether the model stores it as [.., K, N]
    module: nn.Module

    @property
    def columns(self) -> int | None:
        """Input features, if it is a matrix or a stack of them."""
        return None if len(self.shape) < 2 else self.shape[-2 if self.turned else -1]


@dataclass
class _Made:
    """Of which weights in the files a parameter is made.

    Attributes:
        parts: the weights whose rows follow each other, by their number. Each is {number of the expert: name in the
            files}; the number is None if the weight holds all experts, or there are none.
        count: how many parts there must be.
        interleaved: whether the rows of the parts alternate.
        is_bias: whether the parts are biases, which have no columns.
    """

    count: int = 1
    interleaved: bool = False
    is_bias: bool = False
    parts: dict[int, dict[int | None, str]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        return [key for part in self.parts.values() for key in part.values()]

    def is_complete(self) -> bool:
        wanted = ({None}, set(range(len(self.parts.get(0, ())))))
        return len(self.parts) == self.count and all(set(part) in wanted for part in self.parts.values())

    def joined(self, value: Callable[[str], Tensor]) -> Tensor:
        """The rows of all parts. `value` gives those of one weight."""
        parts = []
        for _, part in sorted(self.parts.items()):
            values = [value(part[expert]) for expert in sorted(part, key=lambda number: number or 0)]
            parts.append(values[0] if None in part else torch.stack(values))
        if len(parts) == 1:
            return parts[0]
        rows = -1 if self.is_bias else -2
        if not self.interleaved:
            return torch.cat(parts, rows)
        return torch.stack(parts, parts[0].dim() if self.is_bias else -2).flatten(rows - 1, rows)


class MlxIncoming(Incoming):
    """See `Incoming`."""

    def __init__(
        self, model: Any, weights: MlxWeights, layout: Layout, files: tuple[str, ...], prefix: str = ""
    ) -> None:
        self.where, self.files = weights.where, files
        self._weights, self._layout, self._prefix = weights, layout, prefix
        self._targets = _targets(model)
        self._made: dict[str, _Made] = {}
        for key, name in self._names(model).items():
            self._place(key, name)
        self._made = {name: made for name, made in self._made.items() if made.is_complete()}

    # ---- Incoming ----------------------------------------------------------------------------------------------------

    def held(self, name: str) -> Held | None:
        made = self._made.get(name)
        if made is None:
            return None
        modules = self._modules(name)
        first = modules[0]
        if len({(module.fmt, module.instead, module.setting) for module in modules}) == 1:
            return Held(first.fmt, first.instead, first.note)
        other = next(module for module in modules if module.setting != first.setting or module.fmt != first.fmt)
        note = f"in the file, {first.path} is {first.setting or 'float'} and {other.path} is {other.setting or 'float'}"
        if not all(module.setting for module in modules):
            return Held(note=note)
        affine = [module.fmt for module in modules if isinstance(module.fmt, AffineFormat)]
        common = common_format(affine) if len(affine) == len(modules) else None
        if common is not None:
            return Held(common, note=f"{note}; both kept as {common.name}")
        formats = [module.fmt or module.instead for module in modules]
        widest = max((fmt for fmt in formats if fmt is not None), key=lambda fmt: fmt.bits_per_weight)
        return Held(instead=widest, note=f"{note}; packed anew as {widest.name}")

    def blocks(self, name: str) -> Tensor:
        held, modules = self.held(name), {module.key: module for module in self._modules(name)}
        assert held is not None and held.fmt is not None, "the caller has asked"
        fmt = held.fmt
        return self._made[name].joined(lambda key: self._weights.blocks(modules[key], fmt))

    def read(self, name: str) -> Tensor | None:
        if name not in self._made:
            return None
        modules = {module.key: module for module in self._modules(name)}
        value = self._made[name].joined(lambda key: self._weights.decode(modules[key]))
        return self._as_in_model(name, value)

    def sample(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        keys = self._made[name].keys if name in self._made else []
        if len(keys) != 1 or self._targets[name].turned or name.endswith(self._layout.raised or "/"):
            return None
        key = keys[0]
        if self._weights.is_quantized(key) or self._weights.shape(key) != shape:
            return None
        return self._weights.sample(key, sampled(shape))

    def unused(self, names: Iterable[str]) -> list[str]:
        used = {key for name in names if name in self._made for key in self._made[name].keys}
        return [key for key in self._weights.keys if key not in used and not key.endswith(_COMPUTED)]

    def release(self) -> None:
        self._weights.release()

    # ---- from the names in the files to those of the model -----------------------------------------------------------

    def _names(self, model: Any) -> dict[str, str]:
        """{name in the files: name in the model}, as transformers' loader renames it. Experts get the name of a part."""
        renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
        state, found = model.state_dict(), {}
        for key in self._weights.keys:
            plain = _STACK.sub(".experts.", renamed(key.removeprefix(self._prefix), self._layout.names))
            name = rename_source_key(plain, renamings, [], model.base_model_prefix, state)[0]
            if name not in state and plain in state:  # as in the loader: a name of the model is not changed
                name = rename_source_key(plain, [], [], model.base_model_prefix, state)[0]
            found[key] = name
        return found

    def _place(self, key: str, name: str) -> None:
        """Note of which parameter a weight is a part, if it is."""
        if name in self._targets:
            return self._add(name, _Made(), 0, None, key)
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            role, is_bias = _ROLES.get(expert["role"], expert["role"]), expert["leaf"] == "bias"
            for stack, roles in _PARTS.items():
                target = f"{expert['path']}.{stack}{'_bias' if is_bias else ''}"
                if role in roles and target in self._targets:
                    concatenated = getattr(self._targets[target].module, "is_concatenated", True)
                    made = _Made(len(roles), not concatenated, is_bias)
                    number = None if expert["expert"] is None else int(expert["expert"])
                    return self._add(target, made, roles.index(role), number, key)
        path = name.removesuffix(".weight")
        for whole, ends in self._layout.fused.items():
            for index, end in enumerate(ends):
                target = f"{path.removesuffix(end)}{whole}.weight"
                if path.endswith(f".{end}") and target in self._targets:
                    return self._add(target, _Made(len(ends)), index, None, key)
        return None

    def _add(self, target: str, made: _Made, index: int, expert: int | None, key: str) -> None:
        part = self._made.setdefault(target, made).parts.setdefault(index, {})
        if expert in part:
            raise ValueError(f"{self.where}: {part[expert]} and {key} are both {target} of the model")
        part[expert] = key

    # ---- one parameter -----------------------------------------------------------------------------------------------

    def _modules(self, name: str) -> list[Module]:
        columns = self._targets[name].columns
        return [self._weights.module(key, columns) for key in self._made[name].keys]

    def _as_in_model(self, name: str, value: Tensor) -> Tensor:
        """Turn a float tensor as MLX stores it into the one of the model."""
        target = self._targets[name]
        if is_raised(self._layout, name, value):
            value = value.float() - 1
        if target.turned:
            value = value.transpose(-2, -1)
        if tuple(value.shape) == target.shape:
            return value
        if value.dim() == 3 and tuple(value.transpose(1, 2).shape) == target.shape:  # [out, k, in] of a convolution
            return value.transpose(1, 2)
        if [size for size in value.shape if size != 1] == [size for size in target.shape if size != 1]:
            return value.reshape(target.shape)  # [1] is stored as a number
        return value


def _targets(model: nn.Module) -> dict[str, _Target]:
    """The parameters and saved buffers of a model, which may be packed."""
    found: dict[str, _Target] = {}
    state = set(model.state_dict())
    for path, module in model.named_modules(remove_duplicate=False):
        known = matrices(module)
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{leaf}".lstrip(".")
            if tensor is None or name not in state:
                continue
            if isinstance(module, PackedModule) and leaf in module.packed:
                found[name] = _Target(float_shape(module, leaf), module.is_turned(), module)
                continue
            shape = tuple(tensor.shape)
            probe = torch.empty(shape, device="meta")
            turned = leaf in known and upright(module, probe).stride() != probe.stride()
            found[name] = _Target(shape, turned, module)
    return found
