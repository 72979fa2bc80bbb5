"""The model before its weights are loaded: decide which layers are packed, and replace them by packed layers on meta.

transformers marks loaded parameters with `_is_hf_initialized`. This breaks if it renames the mark;
test_immediate_equals_deferred notices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from isqtorch.files.checkpoints import opened
from isqtorch.formats import QuantFormat, get_format
from isqtorch.importance.moments import load_imatrix
from isqtorch.inplace.feedback import check_moments
from isqtorch.inplace.prepare import Prepared, prepare
from isqtorch.integrations.record import METHOD
from isqtorch.modules import PackedModule, QuantEmbedding, QuantExperts, QuantLinear
from isqtorch.modules.activations import permit
from isqtorch.modules.convert import matrices, name_of, owner_of, to_float, to_packed, weight_matrix
from isqtorch.modules.parameter import PackedParameter
from isqtorch.policy.inventory import Inventory, inspect_model
from isqtorch.policy.request import Request


def describe_unloaded(model: Any, device_map: object) -> Inventory:
    """The inventory of the model as it will be after loading: with tied weights, and each layer on its device."""
    inventory = inspect_model(model, model.all_tied_weights_keys)
    layers = [replace(layer, device_type=_device_type(layer.name, device_map)) for layer in inventory.layers]
    return replace(inventory, layers=layers)


def prepare_on_cpu(inventory: Inventory, request: Request, feeds: bool = False) -> Prepared:
    """The jobs that `quantize_` would have after loading.

    Args:
        inventory: the weights.
        request: the format and options.
        feeds: whether moments for the rule "feedback" are collected later.

    Raises:
        ValueError: see `quantize_`.
    """
    with torch.device("cpu"):  # transformers makes meta the default device here, and no kernel runs on it
        imatrix = load_imatrix(request.options.imatrix)
        if not feeds:
            check_moments(request, imatrix)
        return prepare(inventory, request, imatrix)


def _device_type(name: str, device_map: object) -> str:
    """Device type of a layer, as far as it is known before the layers are placed."""
    if isinstance(device_map, Mapping):
        path = name
        while path and path not in device_map:
            path = path.rpartition(".")[0]
        device = device_map.get(path, "cpu")
        return torch.device(device).type if device != "disk" else "cpu"
    if isinstance(device_map, str):  # "auto", "balanced", ...: on the accelerator if there is one
        return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]
    return "cpu"


Parents = dict[int, list[tuple[nn.Module, str]]]
"""id of a module -> the modules that hold it, and the names under which they do."""


def parents_of(model: nn.Module) -> Parents:
    """Who holds which module. To replace many layers, make it once: to look through all modules each time takes long."""
    found: Parents = {}
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, leaf))
    return found


def pack_on_meta(model: nn.Module, name: str, fmt: QuantFormat, parents: Parents | None = None) -> None:
    """Replace an ordinary layer by a packed one without values.

    Args:
        model: the model.
        name: the layer.
        fmt: its format.
        parents: of the model's modules, kept up to date; None: they are looked for.
    """
    old, leaf = owner_of(model, name)
    if isinstance(old, PackedModule) and leaf in old.packed:
        return  # a module with several names: replaced already
    *rows, columns = weight_matrix(old, leaf).shape
    packed = torch.empty(*rows, fmt.row_bytes(columns), dtype=torch.uint8, device="meta")
    new = to_packed(old, PackedParameter(packed), fmt, leaf)
    # Else transformers would write random numbers into packed bytes that the checkpoint lacks; see `unpack_missing`.
    cast(Any, new)._is_hf_initialized = True
    _replace_everywhere(model, old, new, parents)


def restore(model: Any, layers: Mapping[str, str], files: Sequence[str]) -> None:
    """Replace the layers that config.json lists by packed layers without values.

    Args:
        model: the model, on meta.
        layers: {stored path: format}.
        files: the files of the checkpoint, as far as known.

    Raises:
        ValueError: neither the model nor the checkpoint has a layer, it cannot be packed, or the format does not fit it.
    """
    unknown = []
    parents = parents_of(model)
    for stored, name in layers.items():
        path = _find(model, stored)
        if path is None:
            unknown.append(stored)
            continue
        module, leaf = owner_of(model, path)
        fmt = get_format(name)
        if isinstance(module, PackedModule) and leaf in module.packed:
            if module.packed[leaf] != fmt.name:
                raise ValueError(
                    f"{METHOD}: config.json gives {stored} both {module.packed[leaf]} and {fmt.name}, under two of its names"
                )
            continue
        if leaf not in matrices(module):
            raise ValueError(
                f"{METHOD}: config.json says that {stored} is packed as {fmt.name}, but it is a {type(module).__name__}, which has "
                "no packed form. The checkpoint was made from another model, or is damaged."
            )
        columns = weight_matrix(module, leaf).shape[-1]
        if columns % fmt.block:
            raise ValueError(
                f"{METHOD}: config.json says that {stored} is packed as {fmt.name}, but its {columns} columns are not a multiple of "
                f"{fmt.block}. The checkpoint was made from another model, or is damaged."
            )
        pack_on_meta(model, path, fmt, parents)
    _check_unknown(model, unknown, files)
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts) and len(module.packed) < len(matrices(module)):
            raise ValueError(
                f"{METHOD}: config.json says that {', '.join(module.packed)} of {name} are packed and its other experts are not. The "
                "checkpoint was made from another model, or is damaged."
            )


def restore_activations(model: Any, activations: str | Sequence[str] | None) -> None:
    """Set `activations` of the layers for which config.json has it, after `restore`."""
    if activations is None or isinstance(activations, str):
        permit(model.modules(), activations)
        return
    found = [path for path in (_find(model, stored) for stored in activations) if path is not None]
    permit([owner_of(model, path)[0] for path in found], "fp8")


def _find(model: Any, stored: str) -> str | None:
    """The path of a stored layer in this model, or None if the model does not have it.

    This model may be the base of the saved one, or have a head on top of it.
    """
    prefix = _prefix(model)
    candidates = [stored]
    if prefix:
        candidates += [stored[len(prefix) :]] if stored.startswith(prefix) else [prefix + stored]
    for path in candidates:
        try:
            module, leaf = owner_of(model, path)
        except AttributeError:
            continue
        if path and (leaf == "weight" or leaf in module._parameters):
            return path
    return None


def _prefix(model: Any) -> str:
    """The path of the base model in a model with a head, with a dot; empty for a class without a name for it."""
    return f"{model.base_model_prefix}." if model.base_model_prefix else ""


def _check_unknown(model: Any, unknown: Sequence[str], files: Sequence[str]) -> None:
    """ValueError for a stored layer that this model does not have, unless it is a part that its class does without.

    Such parts are other heads, and layers of the base that only some heads use, such as a pooler. The checkpoint has
    their weights, which are then left out.
    """
    prefix = _prefix(model)
    inner = [stored for stored in unknown if not prefix or stored.startswith(prefix)]
    if not inner:
        return
    tensors = set()
    for file in files:
        if file.endswith(".safetensors"):
            with opened(Path(file), "np") as content:
                tensors.update(content.keys())
    for stored in inner:
        if not tensors & {stored, f"{stored}.weight"}:
            raise ValueError(
                f"{METHOD}: config.json lists the packed layer {stored!r:.200}, which {type(model).__name__} does not have. The checkpoint "
                "was made from another model, or is damaged."
            )


def packed_formats(model: nn.Module) -> dict[str, str]:
    """{path: format} of all packed layers. A layer with several paths has an entry for each."""
    return {
        name_of(name, leaf): format
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
        for leaf, format in module.packed.items()
    }


def unpack_missing(model: Any) -> list[str]:
    """Turn packed layers that the checkpoint lacks into newly initialized float layers; returns their paths."""
    missing = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QuantExperts):
            missing += _unpack_missing_experts(model, name, module)
        if not isinstance(module, (QuantLinear, QuantEmbedding)) or module.weight.device.type == "meta":
            continue  # on meta: offloaded by accelerate
        if getattr(module.weight, "_is_hf_initialized", False):
            bias = getattr(module, "bias", None)
            if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                nn.init.zeros_(bias)
            continue
        missing.append(name)
        if model.get_submodule(name) is not module:
            continue  # a module with several names: replaced already
        columns = get_format(module.format).in_features(module.weight.shape[1])
        shape = (module.weight.shape[0], columns)
        if module.origin not in (nn.Linear, nn.Embedding):
            shape = shape[::-1]
        weight = torch.empty(shape, dtype=module.dtype, device=module.weight.device)
        new = to_float(module, nn.Parameter(weight))
        _replace_everywhere(model, module, new)
        _owner(model, name)._init_weights(new)
    return missing


def _unpack_missing_experts(model: Any, name: str, module: QuantExperts) -> list[str]:
    """`unpack_missing` for experts: if one stack is missing, all stacks of the module become float by decoding."""
    missing = [
        leaf
        for leaf, stack in module._parameters.items()
        if leaf in module.packed
        and stack is not None
        and stack.device.type != "meta"  # offloaded
        and not getattr(stack, "_is_hf_initialized", False)
    ]
    if missing and model.get_submodule(name) is module:
        weights = {}
        for leaf in module.packed:
            weight = module.dequantize(leaf) if leaf not in missing else torch.empty_like(module.dequantize(leaf))
            weights[leaf] = nn.Parameter(weight.transpose(1, 2).contiguous() if module.transposed else weight)
            cast(Any, weights[leaf])._is_hf_initialized = leaf not in missing
        new = module.to_float(weights)
        _replace_everywhere(model, module, new)
        _owner(model, name)._init_weights(new)
    return [name_of(name, leaf) for leaf in module.packed] if missing else []


def _replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module, parents: Parents | None = None) -> None:
    if new is old:
        return
    parents = parents_of(model) if parents is None else parents
    holders = parents.pop(id(old), [])
    for parent, leaf in holders:
        parent._modules[leaf] = new
    parents[id(new)] = holders


def _owner(model: Any, name: str) -> Any:
    """The innermost PreTrainedModel around a module. Its `_init_weights` initializes the layer."""
    owner = model
    path = ""
    for part in name.split(".")[:-1]:
        path = f"{path}.{part}".lstrip(".")
        module = model.get_submodule(path)
        owner = module if hasattr(module, "_init_weights") else owner
    return owner


def offload_error() -> ValueError:
    """The error for layers that a device_map puts on the disk."""
    return ValueError(
        "IsqConfig: the device_map puts layers on the disk, from where transformers would read the float weights again. Quantize "
        "without offloading, save_pretrained, and load the saved model with this device_map."
    )
