"""What loading would give, before a weight is read: the model on the meta device, with packed layers in place.

Writers of other programs' files check it, so that what cannot be written is refused before hours of work.
"""

from __future__ import annotations

from typing import Any

import torch

from isqtorch.formats import AUTO, KEEP, get_format, mix_name
from isqtorch.policy.decide import decide
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.request import Request

from .describing import stored_folder
from .opening import Opened
from .record import METHOD, checked_layers


def rehearsed(opened: Opened, request: Request | None) -> Any | None:
    """The model that `load_opened` would return, without values.

    Args:
        opened: the model.
        request: the format; None: weights stay as they are.

    Returns:
        The model, or None if it depends on the values of the weights: the format "auto".

    Raises:
        ValueError: the request does not fit the model, or no model can be made of the configuration.
    """
    if request is not None and mix_name(request.fmt) == AUTO:
        return None
    model, inventory = _described(opened)
    if request is None or mix_name(request.fmt) == KEEP:
        formats = {layer.name: layer.packed_as for layer in inventory.layers}
    else:
        decisions = decide(inventory.on(request.device).layers, request).decisions
        formats = {each.name: None if each.format is None else each.format.name for each in decisions}
    return _packed(model, formats)


def _packed(model: Any, formats: dict[str, str | None]) -> Any:
    """Put packed layers without values into a model."""
    from .transformers.skeleton import pack_on_meta, parents_of

    parents = parents_of(model)
    for name, fmt in formats.items():
        if fmt is not None:
            pack_on_meta(model, name, get_format(fmt), parents)
    model.tie_weights()
    return model


def _described(opened: Opened) -> tuple[Any, Inventory]:
    """The model without values, and its layers with the formats that the checkpoint has."""
    from .checkpoints.assemble import stored_inventory
    from .transformers.skeleton import describe_unloaded, restore

    if opened.checkpoint is not None:
        model = opened.empty(opened.own_dtype() or torch.float32)
        return model, stored_inventory(model, opened.checkpoint)
    if opened.is_decoded:
        return stored_folder(opened)
    model = opened.empty(opened.own_dtype() or torch.float32)
    entry = getattr(opened.config, "quantization_config", None)
    if opened.quantized_by == METHOD and entry is not None:
        layers = entry["layers"] if isinstance(entry, dict) else entry.layers
        restore(model, checked_layers("load", layers), [])
    return model, describe_unloaded(model, {"": "cpu"})
