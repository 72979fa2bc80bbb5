"""Which values of a state dict a file of tensors can hold."""

from __future__ import annotations

from functools import lru_cache

import safetensors.torch
import torch
from torch import Tensor, nn


def check_storable(op: str, name: str, value: object) -> None:
    """ValueError, with the way out, unless a value of a state dict can be written to a .safetensors file.

    Args:
        op: the public function, for the message.
        name: name of the value in the state dict.
        value: a tensor, or anything else that a module put there.
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{op}: {name} is a {type(value).__name__}; only tensors can be saved. Remove it from the state dict of its layer, or "
            "save the model with torch.save."
        )
    if nn.parameter.is_lazy(value):
        raise ValueError(f"{op}: {name} has no shape yet. Run the model once, then save it.")
    if value.device.type == "meta":
        raise ValueError(f"{op}: {name} is on the meta device and has no values. Load the weights first.")
    why = _why_not(value)
    if why is not None:
        raise ValueError(
            f"{op}: {name} is {why}, which a .safetensors file cannot hold. Turn the layer into ordinary floats first, or save the "
            "model with the library that made it so."
        )


def _why_not(tensor: Tensor) -> str | None:
    """What a tensor is that no file of tensors can hold, or None."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a tensor of the layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return f"a quantized tensor of torch ({str(tensor.dtype).removeprefix('torch.')})"
    if not _has_memory(tensor):
        kind = type(tensor)
        return f"a {kind.__name__} of the package {kind.__module__.partition('.')[0]}, a tensor made of other tensors"
    return None if _known(tensor.dtype) else f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own. A subclass that wraps other tensors, such as those of torchao, has none."""
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


@lru_cache
def _known(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for a type."""
    try:
        safetensors.torch.save({"empty": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, safetensors.SafetensorError):
        return False
    return True
