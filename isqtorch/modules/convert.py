"""Find out which layers can be quantized, and convert a layer to its packed form and back.

Layers are matched by exact type, because subclasses of nn.Linear and nn.Embedding may have code that expects a float
weight; subclasses.py lists the exceptions. Conv1D of transformers, a linear layer with a transposed weight, is
recognized by name, so that transformers need not be imported.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from isqtorch.formats import QuantFormat, get_format

from .embedding import QuantEmbedding
from .experts import QuantExperts, experts_class, stacks
from .linear import QuantLinear
from .packed import PackedModule, decoded, ordinary_tensors
from .parameter import is_plain
from .subclasses import attributes_of, base_of, is_understood, meaning_of, rebuilt, scale_of

Kind = Literal["linear", "conv1d", "embedding", "experts"]

# These dicts move to the new module as the same objects, so that handles returned by register_*_hook keep working.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def layer_kind(module: nn.Module) -> Kind | None:
    """Return the kind of a layer that can be quantized, or None for other modules."""
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.Embedding:
        return "embedding"
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    if experts_class(module) is not None:
        return "experts"
    meaning = meaning_of(type(module))
    return meaning.kind if meaning is not None and is_understood(module) else None


def matrices(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's parameters that are packed or can be packed."""
    if isinstance(module, QuantExperts):
        return tuple(stacks(module))
    if isinstance(module, PackedModule):
        return tuple(module.packed)
    kind = layer_kind(module)
    return () if kind is None else tuple(stacks(module)) if kind == "experts" else ("weight",)


def locate(model: nn.Module, name: str) -> tuple[str, str]:
    """Return (path of the module, name of the parameter) of a weight.

    The name of a weight is the path of its module if the parameter is called "weight", else the path of the parameter.
    """
    try:
        model.get_submodule(name)
    except AttributeError:
        path, _, leaf = name.rpartition(".")
        return path, leaf
    return name, "weight"


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return (module, name of the parameter) of a weight; see `locate`."""
    path, leaf = locate(model, name)
    return model.get_submodule(path), leaf


def parameter_name(model: nn.Module, name: str) -> str:
    """Return the name of a weight in the state dict; see `locate`."""
    return ".".join(filter(None, locate(model, name)))


def name_of(path: str, leaf: str) -> str:
    """Return the name of a weight; the inverse of `locate`."""
    return path if leaf == "weight" else f"{path}.{leaf}"


def obstacle(module: nn.Module, leaf: str = "weight") -> str | None:
    """Return why a module cannot be quantized although its kind is known, or None if it can."""
    weight = module._parameters.get(leaf)
    if weight is None:
        return "its weight is computed from other parameters (weight norm or a parametrization): remove that first"
    if not is_plain(weight):
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if "forward" in vars(module):
        return "its forward was replaced on the instance (an accelerate or offload hook?): remove the hook first"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites rows while it looks them up; packed rows cannot change"
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        return "scale_grad_by_freq is for a table that learns; a packed table does not"
    return None


def weight_matrix(module: nn.Module, leaf: str = "weight") -> Tensor:
    """Return a view of a layer's float weight as `[N, K]` or `[E, N, K]`, even if the layer stores it transposed."""
    return upright(module, cast(Tensor, getattr(module, leaf)))


def upright(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a view, `[N, K]` or `[E, N, K]`, of a tensor with the same layout as the layer's float weight."""
    if isinstance(module, QuantExperts):  # a stack that is not packed yet
        return weight.transpose(1, 2) if module.transposed else weight
    kind, experts = layer_kind(module), experts_class(module)
    if experts is not None:
        return weight.transpose(1, 2) if experts._is_transposed(module) else weight
    return weight.t() if kind == "conv1d" else weight


def float_shape(module: PackedModule, leaf: str = "weight") -> tuple[int, ...]:
    """Return the shape that a packed weight had in the layer that `module` replaced."""
    *rows, row_bytes = cast(Tensor, module._parameters[leaf]).shape
    columns = get_format(module.packed[leaf]).in_features(row_bytes)
    return (*rows[:-1], columns, rows[-1]) if module.is_turned() else (*rows, columns)


def to_packed(
    module: nn.Module, packed: nn.Parameter, fmt: QuantFormat, leaf: str = "weight"
) -> QuantLinear | QuantEmbedding | QuantExperts:
    """Make the packed form of a layer. The layer may be an ordinary one or a packed one.

    Bias, hooks and training mode move to the new module; the weight of `module` does not change. If `module` is a
    QuantExperts, it is not replaced: it gets the packed stack and is returned.

    Args:
        module: the layer.
        packed: uint8 `[N, row_bytes]` or `[E, N, row_bytes]`.
        fmt: the format of `packed`.
        leaf: name of the parameter.
    """
    if isinstance(module, QuantExperts) or layer_kind(module) == "experts":
        experts = module if isinstance(module, QuantExperts) else QuantExperts.from_float(module)
        experts.put(leaf, packed, fmt)
        return experts
    if isinstance(module, PackedModule):
        dtype, origin, trainable = module.dtype, module.origin, module.origin_requires_grad
        subclass, attributes = module.subclass, module.subclass_attributes
    else:
        weight = cast(Tensor, module.weight)
        dtype, origin, trainable = weight.dtype, type(module), weight.requires_grad
        subclass, attributes = None, {}
        if meaning_of(origin) is not None:
            origin, subclass, attributes = base_of(origin), origin, attributes_of(module)
    new: QuantLinear | QuantEmbedding
    if isinstance(module, nn.Embedding):
        new = QuantEmbedding.from_packed(packed, fmt, padding_idx=module.padding_idx, dtype=dtype)
        new.sparse = module.sparse
        if isinstance(module, QuantEmbedding):
            new.scale, new.scale_is_rounded = module.scale, module.scale_is_rounded
        else:
            new.scale, new.scale_is_rounded = scale_of(module)
    else:
        new = QuantLinear.from_packed(packed, fmt, bias=cast("Tensor | None", module.bias), dtype=dtype)
        if isinstance(module, QuantLinear) and module.format == fmt.name:
            new.activations = module.activations
    new.origin, new.origin_requires_grad = origin, trainable
    new.subclass, new.subclass_attributes = subclass, attributes
    _carry_over(module, new)
    return new


def experts_to_float(module: QuantExperts, dtype: torch.dtype | None = None) -> nn.Module:
    """Make the module that the packed experts replaced, with the decoded weights."""
    weights = {}
    for name, format in module.packed.items():
        with ordinary_tensors():
            weight = decoded(getattr(module, name), format, dtype or module.dtype)
            if module.transposed:
                weight = weight.transpose(1, 2).contiguous()
        weights[name] = nn.Parameter(weight, requires_grad=module.origin_requires_grad)
    return module.to_float(weights)


def to_float(module: QuantLinear | QuantEmbedding, weight: nn.Parameter) -> nn.Module:
    """Make the ordinary layer that `module` replaced, with `weight` in that layer's layout (see `float_weight`)."""
    new: Any
    with torch.device("meta"):
        if module.subclass is not None:
            new = rebuilt(module.subclass, module.subclass_attributes, weight)
        elif isinstance(module, QuantEmbedding):
            new = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, sparse=module.sparse)
        elif module.origin is nn.Linear:
            new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        else:
            new = module.origin(module.out_features, module.in_features)  # Conv1D(nf, nx)
    new.weight = weight
    if isinstance(module, QuantLinear):
        new.bias = module.bias
    _carry_over(module, new)
    return cast(nn.Module, new)


def float_weight(module: QuantLinear | QuantEmbedding, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Make a float parameter with the decoded weights, in the layout of the layer that `module` replaced."""
    with ordinary_tensors():
        weight = decoded(module.weight, module.format, dtype or module.dtype)
        if module.is_turned():
            weight = weight.t().contiguous()
    return nn.Parameter(weight, requires_grad=module.origin_requires_grad)


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    new.training = old.training
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]


def put_module(model: nn.Module, name: str, new: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._modules[leaf] = new
