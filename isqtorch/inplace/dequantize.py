"""dequantize_: turn the quantized layers of a model back into float layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from isqtorch.modules import PackedModule, QuantEmbedding, QuantExperts, QuantLinear
from isqtorch.modules.convert import experts_to_float, float_weight, put_module, to_float
from isqtorch.policy.inventory import check_model, packed_names, storage_key

from .host import announce
from .origin import forget
from .pack import naming_memory
from .vectors import forget_vectors


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn every quantized layer back into the float layer that it was.

    These are nn.Linear, nn.Embedding, Conv1D, and fused experts. The new weights are the decoded ones, so the
    quantization error stays. Tied weights stay tied.

    Args:
        model: a model with quantized layers; changed in place.
        dtype: float type of the weights and of the layers' biases; None keeps the type of each layer.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the model has no quantized layer or is itself one, or `dtype` is not a float type.
        MemoryError, torch.OutOfMemoryError, RuntimeError: memory ran out while a layer was decoded. The layers before it
            are floats, the others are still packed, and the model runs; call `dequantize_` again.

    Example:
        isqtorch.quantize_(model, "q4k")
        isqtorch.dequantize_(model, torch.bfloat16)
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dequantize_: dtype must be a float type, got {dtype}")
    check_model(model, "dequantize_")
    names = packed_names(model)
    if not names:
        raise ValueError("dequantize_: the model holds no quantized layer.")
    groups: dict[object, list[str]] = {}
    for name in names:
        module = model.get_submodule(name)
        key = id(module) if isinstance(module, QuantExperts) else storage_key(_weight(model, name))
        groups.setdefault(key, []).append(name)
    for number, group in enumerate(groups.values()):
        state = (
            f"{number} of {len(groups)} weights are floats again, the others are packed as before, and the model runs. Free "
            "memory, and call dequantize_ again."
        )
        with naming_memory("dequantize_", group[0], "decoded", state):
            _decode(model, group, dtype)
    forget(model)
    forget_vectors(model)
    announce(model, None)


def _decode(model: nn.Module, names: list[str], dtype: torch.dtype | None) -> None:
    """Put float layers in the place of packed ones that share one weight."""
    weights: dict[bool, nn.Parameter] = {}  # by orientation
    done: dict[int, nn.Module] = {}
    for name in names:
        old = model.get_submodule(name)
        if not isinstance(old, PackedModule):
            continue  # a module with several names: replaced already
        if id(old) not in done and isinstance(old, QuantExperts):
            new = experts_to_float(old, dtype)
            done[id(old)] = new if dtype is None else new.to(dtype)
        elif id(old) not in done:
            assert isinstance(old, (QuantLinear, QuantEmbedding))
            transposed = old.origin not in (nn.Linear, nn.Embedding)
            if transposed not in weights:
                weights[transposed] = float_weight(old, dtype)
            new = to_float(old, weights[transposed])
            done[id(old)] = new if dtype is None else new.to(dtype)
        put_module(model, name, done[id(old)])


def _weight(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight)
