"""Inventory: every weight of a live model, described for the policy.

No description keeps a reference to a tensor, so the weights can be freed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from isqtorch.formats import get_format
from isqtorch.modules import PackedModule, QuantExperts
from isqtorch.modules.convert import layer_kind, matrices, name_of, obstacle, weight_matrix
from isqtorch.modules.foreign import Foreign, find_foreign
from isqtorch.modules.parameter import PackedParameter

from .layers import LayerInfo, Role, head_by_name
from .pipelines import no_module
from .weight_reads import layers_read_directly

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Inventory:
    """All weights of a model: tensors of two or more dimensions one by one, the others as totals.

    Only tensors in the `state_dict` count; buffers that are not saved do not.
    """

    layers: list[LayerInfo]
    rest_bytes: int  # vectors (norms, biases) and saved buffers
    rest_numel: int
    foreign: Foreign | None = None  # the layers that another quantizer holds

    @property
    def numel(self) -> int:
        """Number of weights in the model, including those that are not quantized; shared weights count once."""
        return self.rest_numel + sum(layer.numel for layer in self.layers if layer.tied_to is None)

    def on(self, device: torch.device | None) -> Inventory:
        """The inventory with all layers on `device`; None changes nothing."""
        if device is None:
            return self
        return replace(self, layers=[replace(layer, device_type=device.type) for layer in self.layers])


def inspect_model(model: nn.Module, shared: Mapping[str, str] | None = None) -> Inventory:
    """Describe every parameter and saved buffer of `model`.

    Layers that share a weight are all listed; `tied_to` of the later ones names the first.

    Args:
        model: may be on the meta device.
        shared: parameters that will be tied later but are still separate tensors: name -> name of the parameter it is
            tied to.
    """
    others = {} if not shared else {name: model.get_parameter(source) for name, source in shared.items()}
    owners = _layers_by_name(model)
    roles = _hugging_face_roles(model)
    kept = _kept_in_float(model)
    readers = {key: f"{cls} reads its weight directly" for key, cls in layers_read_directly(model).items()}
    readers |= _held_in_lists(model)
    foreign = find_foreign(model)
    held = set(foreign.layers) if foreign is not None else set()
    first: dict[object, int] = {}  # storage -> index into layers
    layers: list[LayerInfo] = []
    rest: dict[object, tuple[int, int]] = {}  # storage -> (bytes, elements)
    for name, module in owners:
        for leaf, weight in _tensors(module):
            key = storage_key(others.get(f"{name}.{leaf}", weight))
            if name in held and weight.dim() > 1 and not isinstance(weight, nn.Parameter) and key not in first:
                first[key] = len(layers)
                layers.append(_describe_held(name, leaf, weight))
                continue
            if weight.dim() < 2 or not isinstance(weight, nn.Parameter):
                rest[key] = (weight.numel() * weight.element_size(), weight.numel())
                continue
            info = _describe(name, module, leaf, weight, roles, kept, readers)
            if key in first:
                info = replace(info, tied_to=layers[first[key]].name)
            else:
                first[key] = len(layers)
            layers.append(info)
    layers = _spread_over_ties(layers)
    return Inventory(layers, sum(size for size, _ in rest.values()), sum(count for _, count in rest.values()), foreign)


def storage_key(tensor: Tensor) -> object:
    """Equal for tensors with the same memory, shape, strides and dtype. A meta tensor equals only itself."""
    if (
        tensor.device.type == "meta"
        or tensor.numel() == 0
        or type(tensor) not in (Tensor, nn.Parameter, PackedParameter)
    ):
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def packed_names(model: nn.Module) -> list[str]:
    """Paths of the layers that hold packed weights."""
    return [name for name, module in _layers_by_name(model) if isinstance(module, PackedModule)]


def _layers_by_name(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules under all their names: a module used twice is there twice."""
    return list(model.named_modules(remove_duplicate=False))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters and saved buffers."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _describe(
    name: str,
    module: nn.Module,
    leaf: str,
    weight: nn.Parameter,
    roles: dict[int, Role],
    kept: list[tuple[str, re.Pattern[str]]],
    readers: dict[int, str],
) -> LayerInfo:
    device = weight.device.type
    if isinstance(module, QuantExperts) or layer_kind(module) == "experts":
        if leaf in matrices(module):
            return _describe_experts(name, module, leaf, weight, kept, readers)
    elif isinstance(module, PackedModule) and leaf == "weight":
        packed = cast(Any, module)
        is_table = isinstance(module, nn.Embedding)
        shape = (weight.shape[0], packed.embedding_dim if is_table else packed.in_features)
        kind: Literal["linear", "embedding"] = "embedding" if is_table else "linear"
        return LayerInfo(
            name,
            kind,
            shape,
            packed.dtype,
            _role(name, module, kind, roles),
            device_type=device,
            packed_as=packed.format,
        )
    known = layer_kind(module)
    if known is None or known == "experts" or leaf != "weight":
        path = name if leaf == "weight" and name else f"{name}.{leaf}".lstrip(".")
        return LayerInfo(
            path, "other", tuple(weight.shape), weight.dtype, device_type=device, keep=_why_other(module, leaf, weight)
        )
    kind = "embedding" if known == "embedding" else "linear"
    reader = readers.get(id(module))
    keep = obstacle(module) or reader or _kept_reason(name, kept)
    shape_2d = cast("tuple[int, int]", tuple(weight_matrix(module).shape))
    return LayerInfo(
        name, kind, shape_2d, weight.dtype, _role(name, module, kind, roles), device_type=device, keep=keep
    )


def _describe_held(name: str, leaf: str, weight: Tensor) -> LayerInfo:
    """Describe a matrix that another quantizer keeps in a buffer."""
    path = name_of(name, leaf).lstrip(".")
    shape, device = tuple(weight.shape), weight.device.type
    return LayerInfo(path, "other", shape, weight.dtype, device_type=device, keep="another quantizer holds it")


def _describe_experts(
    name: str,
    module: nn.Module,
    leaf: str,
    weight: nn.Parameter,
    kept: list[tuple[str, re.Pattern[str]]],
    readers: dict[int, str],
) -> LayerInfo:
    """Describe one stack of fused experts, under the name of its parameter."""
    device = weight.device.type
    path = name_of(name, leaf)
    if isinstance(module, QuantExperts) and leaf in module.formats:
        fmt = get_format(module.formats[leaf])
        shape = (*weight.shape[:2], fmt.in_features(weight.shape[2]))
        return LayerInfo(path, "experts", shape, module.dtype, device_type=device, packed_as=fmt.name, block=name)
    reader = readers.get(id(module))
    keep = obstacle(module, leaf) or reader
    shape = tuple(weight_matrix(module, leaf).shape)
    return LayerInfo(
        path,
        "experts",
        shape,
        weight.dtype,
        device_type=device,
        keep=keep or _kept_reason(name, kept),
        block=name,
    )


def _role(name: str, module: nn.Module, kind: str, roles: dict[int, Role]) -> Role:
    if kind == "embedding":
        return "embedding"
    return "head" if roles.get(id(module)) == "head" or head_by_name(name) else ""


def _why_other(module: nn.Module, leaf: str, weight: Tensor) -> str:
    """Reason why a parameter with two or more dimensions is not quantized."""
    cls = type(module).__name__
    if isinstance(module, _CONVOLUTIONS):
        return "convolutions are never quantized"
    if isinstance(module, _RECURRENT):
        return f"{cls} reads its weights directly: not quantized"
    if isinstance(module, nn.Linear):
        return f"{cls} is a subclass of nn.Linear with code of its own: not quantized"
    if isinstance(module, nn.Embedding):
        return f"{cls} is a subclass of nn.Embedding with code of its own: not quantized"
    if leaf.endswith("_bias"):
        return "biases, also those of experts, are never quantized"
    if re.search("router|gate$", cls, re.IGNORECASE):
        return "routers are small and sensitive, never quantized"
    if weight.dim() == 3 and "expert" in cls.lower():
        return f"{cls} are fused experts with code of their own: not quantized"
    return f"a parameter of {cls} itself: only the weights of nn.Linear, nn.Embedding, Conv1D and fused experts are quantized"


def _held_in_lists(model: nn.Module) -> dict[int, str]:
    """{id of a module: why it stays} of modules that others hold in a plain list as well.

    They are called through the list, where nothing replaces them: the float layer would run on, as in MaskFormer.
    """
    return {
        id(item): f"the plain list {name!r} of {type(module).__name__} holds it as well"
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) in (list, tuple)
        for item in value
        if isinstance(item, nn.Module)
    }


def _kept_in_float(model: nn.Module) -> list[tuple[str, re.Pattern[str]]]:
    """(path of a module, pattern of names below it) that a transformers model wants to keep in float32.

    Breaks silently if transformers renames `_keep_in_fp32_modules`: test_quantize.py sets the attribute itself.
    """
    kept = []
    for path, module in model.named_modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            names = getattr(module, attribute, None)
            if names:
                pattern = "|".join(re.escape(str(name)) for name in names)
                kept.append((f"{path}." if path else "", re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)")))
    return kept


def _kept_reason(name: str, kept: list[tuple[str, re.Pattern[str]]]) -> str | None:
    for path, pattern in kept:
        if name.startswith(path) and pattern.search(f"{name[len(path) :]}.weight"):
            return "the model keeps it in float32 (_keep_in_fp32_modules)"
    return None


def _hugging_face_roles(model: nn.Module) -> dict[int, Role]:
    """id of a module -> role, from `get_output_embeddings` of a transformers model."""
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return {}
    try:
        head = getter()
    except (AttributeError, NotImplementedError):
        return {}
    return {id(head): "head"} if isinstance(head, nn.Module) else {}


def _spread_over_ties(layers: list[LayerInfo]) -> list[LayerInfo]:
    """Apply facts about one tied layer to the others: a linear layer that shares an embedding's table is a head."""
    groups: dict[str, list[LayerInfo]] = {}
    for layer in layers:
        groups.setdefault(layer.holder, []).append(layer)
    out = []
    for layer in layers:
        group = groups[layer.holder]
        if len(group) > 1 and layer.kind != "other":
            if layer.kind == "linear" and any(other.kind == "embedding" for other in group):
                layer = replace(layer, role="head")
            if len({other.shape for other in group if other.kind != "other"}) > 1:
                layer = replace(layer, keep=layer.keep or "layers use the same weight in different orientations")
        out.append(layer)
    return out


def check_model(model: nn.Module, op: str, fmt: object = None) -> None:
    """Raise unless `model` is a module around the layers, with shapes: a layer itself cannot be replaced in place.

    Args:
        model: what was given as the model.
        op: name of the public function, for messages.
        fmt: what was given as the format, to notice if the two are in the wrong order.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: {no_module(model, op, fmt)}")
    if layer_kind(model) is not None or isinstance(model, PackedModule):
        raise ValueError(
            f"{op}: a bare {type(model).__name__} cannot be replaced in place. Wrap it, as in nn.Sequential(layer), or use "
            "isqtorch.quantize on its weight."
        )
    lazy = next((name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)), None)
    if lazy is not None:
        raise ValueError(f"{op}: {lazy} has no shape yet, because its layer is lazy. Run the model once before.")
