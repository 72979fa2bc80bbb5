"""Describe a checkpoint for `plan`: as the model of transformers that it would be, on the meta device."""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch

from isqtorch.files.checkpoints import Checkpoint, checkpoint_files, read_json, special_floats
from isqtorch.files.tensors import DTYPES
from isqtorch.policy.inventory import Inventory
from isqtorch.report.plan import Described

from .checkpoints.doors import open_checkpoint
from .classes import auto_class
from .opening import Opened, empty_model, needs_transformers, stored_entry

_MOST_BLOCKS = 4096  # of a configuration; each is made in Python
_ENOUGH = 0.95  # share of a model's parameters that its files must hold: some are tied, or computed without a record


class TransformersDescriber:
    """See `isqtorch.report.plan.Describer`. transformers is imported when it is first asked."""

    def other(self, source: object) -> Described | None:
        if not isinstance(source, (str, os.PathLike)):
            return None
        if open_checkpoint(source, local=True) is None:
            return _stored(Path(source).expanduser())
        with needs_transformers():
            import accelerate  # noqa: F401
        from .checkpoints.assemble import stored_inventory

        opened = Opened.of(source, local=True)
        assert opened.checkpoint is not None
        model = opened.empty(opened.own_dtype() or torch.float32)
        inventory = stored_inventory(model, opened.checkpoint)
        note = f"what is packed anew is made of decoded {opened.checkpoint.kind} weights: their errors stay"
        packed = any(layer.packed_as for layer in inventory.layers)
        return Described(inventory, [note] if packed else [], opened.config.to_dict())

    def model(self, found: Checkpoint) -> Inventory | str:
        missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
        if missing:
            return f"{missing[0]} is not installed (pip install 'isqtorch[hf]')"
        kind = found.config.get("model_type")
        from transformers import CONFIG_MAPPING

        from .transformers.skeleton import describe_unloaded

        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            return f"transformers has no model_type {kind!r:.80}"
        if _blocks(found.config) > _MOST_BLOCKS:
            return "its config.json names more layers than a model has"
        try:
            config = CONFIG_MAPPING[kind].from_dict(special_floats(dict(found.config)))
            auto, _ = auto_class(kind, config)
            own = getattr(config, "dtype", None)
            dtype = own if isinstance(own, torch.dtype) and own.is_floating_point else _common_type(found)
            model = empty_model(auto, config, dtype)
        except Exception as error:  # of any kind: the classes compute with the values of the configuration
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"no model can be made of its config.json ({type(error).__name__}: {why:.200})"
        inventory = describe_unloaded(model, {"": "cpu"})
        return inventory if _fits(found, model, inventory) else "its config.json does not fit its tensors"


def _stored(folder: Path) -> Described | None:
    """Describe a folder that another library has quantized in a way that is read here; None for every other source."""
    if not (folder / "config.json").is_file() or "quantization_config" not in read_json(folder / "config.json"):
        return None
    if any(find_spec(name) is None for name in ("transformers", "accelerate")):
        return None  # `plan` refuses it
    opened = Opened.of(folder, local=True)
    if not opened.is_decoded:
        return None
    _, inventory = stored_folder(opened)
    note = f"what is packed anew is made of weights that {opened.quantized_by} has quantized: their errors stay"
    return Described(inventory, [note], opened.config.to_dict())


def stored_folder(opened: Opened) -> tuple[Any, Inventory]:
    """A folder that another library has quantized in a way that is read here: its model, on the meta device, and its layers.

    `packed_as` of a layer is the format that it gets if nothing is asked for.
    """
    from .transformers.skeleton import describe_unloaded
    from .transformers.stored import StoredLoad

    entry = stored_entry(opened.config)
    assert entry is not None, "is_decoded"
    opened = replace(opened, config=copy.deepcopy(opened.config))
    for part in (opened.config, opened.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model = opened.empty(opened.own_dtype() or torch.bfloat16)
    inventory = describe_unloaded(model, {"": "cpu"})
    load = StoredLoad.open(model, entry, [str(file) for file in checkpoint_files(Path(opened.source), "plan")])
    kept = load.assigned(inventory)
    layers = [
        replace(layer, packed_as=str(kept[layer.name].format)) if layer.name in kept and layer.keep is None else layer
        for layer in inventory.layers
    ]
    return model, load.described(replace(inventory, layers=layers))


def _common_type(found: Checkpoint) -> torch.dtype:
    """The float type of most values in the files."""
    counts: Counter[torch.dtype] = Counter()
    for name, shape in found.headers.values():
        dtype = DTYPES.get(name)
        if dtype is not None and dtype.is_floating_point:
            counts[dtype] += prod(shape)
    return counts.most_common(1)[0][0] if counts else torch.float32


def _fits(found: Checkpoint, model: Any, inventory: Inventory) -> bool:
    """Whether the files can hold the weights of this model: those of the same name have the same size."""
    sizes = {name: tensor.numel() for name, tensor in model.state_dict(keep_vars=True).items()}
    computed = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    absent = sum(
        layer.numel
        for layer in inventory.layers
        if layer.tied_to is None and any(re.search(each, f"{layer.name}.weight") for each in computed)
    )
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for name, (_, shape) in found.headers.items():
        own = next((each for each in (name, prefix + name, name.removeprefix(prefix)) if each in sizes), None)
        if own is not None and sizes[own] != prod(shape):
            return False
    return sum(prod(shape) for _, shape in found.headers.values()) >= _ENOUGH * (inventory.numel - absent)


def _blocks(config: Mapping[str, Any], depth: int = 3) -> int:
    """The largest number of layers or experts in a configuration and its parts."""
    own = [value for name, value in config.items() if type(value) is int and ("layer" in name or "expert" in name)]
    parts = [_blocks(value, depth - 1) for value in config.values() if isinstance(value, Mapping) and depth]
    return max([*own, *parts], default=0)
