"""Refuse models whose layers another quantizer holds; `modules/foreign.py` finds them."""

from __future__ import annotations

from isqtorch.modules.foreign import Foreign

from .request import Request


def check_foreign(foreign: Foreign | None, request: Request) -> None:
    """ValueError if another quantizer holds layers; `foreign` is that of the model's inventory.

    Both quantizers in one model are allowed if the request leaves out each of these layers by name and the result can
    be stored. transformers has a place for one quantizer only, and special tensors fit in no file of tensors.
    """
    if foreign is None:
        return
    can_mix = foreign.plain and not foreign.recorded
    if can_mix and all(_left_out(layer, request) for layer in foreign.layers):
        return
    if foreign.recorded:
        why = "Only the others would be packed, and what save_pretrained writes could not be read: it records one quantizer."
        ways = (
            "Turn these layers into floats first (model.dequantize(), if the quantizer has that), or load the checkpoint again with "
            "quantization_config=isqtorch.IsqConfig(...), which decodes most methods weight by weight."
        )
    elif can_mix:
        why = "Only the others would be packed."
        ways = "Turn these layers into floats first, or leave them out by name with exclude to have both in one model."
    else:
        why = "Only the others would be packed, and isqtorch.checkpoint cannot store these."
        ways = "Turn these layers into floats first, or quantize the original model."
    raise ValueError(f"{request.op}: {foreign}. {why} {ways} Nothing was changed.")


def _left_out(layer: str, request: Request) -> bool:
    """Whether the options leave a layer out by its name."""
    if any(pattern.regex.search(layer) for pattern in request.excluded):
        return True
    return request.included is not None and not any(pattern.regex.search(layer) for pattern in request.included)
