"""Layers that another quantizer holds: bitsandbytes, torchao, compressed-tensors, GPTQ, AWQ, FP8 of transformers, ...

Their classes are not those that we pack, so only a rest of the model would be packed, and nobody could read what is
saved. They are found in three ways, without importing any of these packages: by the package of their class, by what
they store (integers or 8-bit floats beside scales), and by the record that transformers keeps of its quantizer. A
quantizer that only read a file, and left plain floats, holds no layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.text import first_names

from .convert import layer_kind
from .packed import PackedModule

_OURS = "isq"  # the name under which transformers knows our own quantizer

# package -> name for messages
_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "torch.ao.nn.quantized": "torch.ao",
    "torch.ao.nn.intrinsic.quantized": "torch.ao",
    "compressed_tensors": "compressed-tensors",
    "gptqmodel": "GPTQModel",
    "auto_gptq": "AutoGPTQ",
    "auto_round": "AutoRound",
    "awq": "AutoAWQ",
    "hqq": "hqq",
    "optimum.quanto": "quanto",
    "quanto": "quanto",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "spqr_quant": "SpQR",
    "quark": "Quark",
}
_INTEGRATIONS = (
    "aqlm|awq|bitnet|bitsandbytes|compressed_tensors|eetq|fbgemm_fp8|finegrained_fp8|fouroversix|fp_quant|gguf|higgs|"
    "hqq|metal_quantization|mxfp4|nvfp4|quanto|sinq|spqr|torchao|vptq"
)
_OF_TRANSFORMERS = re.compile(rf"transformers\.integrations\.({_INTEGRATIONS})(?:\.|$)")

# Types that weights are stored in only after quantization. int64 and bool are for indices and masks.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ORDINARY = (*_FLOATS, torch.complex64, torch.complex128, torch.int64, torch.bool)
_SCALE = re.compile(r"scale|zero|absmax|quant|codebook|step", re.IGNORECASE)
_WEIGHT = re.compile(r"weight|kernel|packed|codes|blocks|W_q", re.IGNORECASE)


@dataclass(frozen=True)
class Foreign:
    """The layers of a model that another quantizer holds.

    Attributes:
        method: name of the quantizer.
        layers: paths of the layers; "" for the model itself.
        classes: names of their classes, of their weights if these are special tensors.
        recorded: whether transformers writes the quantizer into the model's configuration, where only one has a place.
        plain: whether ordinary tensors hold all their state, so that any file of tensors can store it.
    """

    method: str
    layers: tuple[str, ...]
    classes: tuple[str, ...]
    recorded: bool
    plain: bool

    def __str__(self) -> str:
        layers = first_names([layer or "the model itself" for layer in self.layers], 2)
        count = f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        return f"{self.method} holds {count} ({', '.join(self.classes)}: {layers})"


def find_foreign(model: nn.Module) -> Foreign | None:
    """The layers of another quantizer, or None if there are none."""
    recorded = recorded_method(model)
    homes = {type(module).__module__.partition(".")[0] for module in model.modules() if hasattr(module, "base_model")}
    layers: list[str] = []
    classes: dict[str, None] = {}  # in order
    makers: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            continue
        found = _by_package(module) or _by_contents(module)
        if found is None and recorded is not None and _is_unknown(module, homes):
            found = "", type(module).__name__
        if found is not None and not any(_is_inside(name, layer) for layer in layers):
            layers.append(name)
            makers[found[0]] = None
            classes[found[1]] = None
    if not layers:
        return None
    names = [maker for maker in makers if maker]
    method = recorded or " and ".join(names) or "another quantizer"
    saves = recorded is not None or any(hasattr(module, "save_pretrained") for module in model.modules())
    plain = all(_is_plain(model.get_submodule(layer)) for layer in layers)
    return Foreign(method, tuple(layers), tuple(classes), saves, plain)


def recorded_method(model: nn.Module) -> str | None:
    """The name of another quantizer in the records that transformers keeps of a model and its parts, or None."""
    for module in model.modules():
        own = vars(module)
        config = getattr(own.get("hf_quantizer"), "quantization_config", None) or getattr(
            own.get("config"), "quantization_config", None
        )
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        method = own.get("quantization_method") if method is None else method
        name = str(getattr(method, "value", method))  # an enum for transformers' own methods
        if method is not None and name != _OURS:
            return name
    return None


# ---- how a layer is recognized ---------------------------------------------------------------------------------------


def _by_package(module: nn.Module) -> tuple[str, str] | None:
    """(quantizer, class) of a layer whose class, or the class of whose weight, comes from a package that quantizes."""
    if hasattr(module, "quantization_scheme"):  # compressed-tensors marks ordinary layers
        return _PACKAGES["compressed_tensors"], type(module).__name__
    for cls in (type(module), *(type(tensor) for _, tensor in _tensors(module))):
        for base in cls.__mro__:
            maker = _maker(base.__module__)
            if maker is not None:
                return maker, cls.__name__
    return None


@lru_cache(4096)
def _maker(path: str) -> str | None:
    """The quantizer that a Python module belongs to, or None."""
    match = _OF_TRANSFORMERS.match(path)
    if match:
        return match[1]
    parts = path.split(".")
    return next((_PACKAGES[part] for n in range(1, len(parts) + 1) if (part := ".".join(parts[:n])) in _PACKAGES), None)


def _by_contents(module: nn.Module) -> tuple[str, str] | None:
    """("", class) of a layer that stores its weights as integers or 8-bit floats, with something that scales them."""
    tensors = list(_tensors(module))
    names = {name for name, _ in tensors}
    if layer_kind(module) is not None and names <= {"weight", "bias"} and not _is_composed(tensors):
        return None  # an ordinary layer that was cast: it stays as it is, and the report says so
    for name, tensor in tensors:
        if _is_composed([(name, tensor)]):
            return "", type(tensor).__name__
        if tensor.dtype not in _ORDINARY and tensor.dim() > 0 and tensor.numel() > 1:
            scaled = tensor.dtype.itemsize == 1 and any(_SCALE.search(other) for other in names - {name})
            if isinstance(tensor, nn.Parameter) or (tensor.dim() > 1 and (scaled or _WEIGHT.search(name))):
                return "", type(module).__name__
    return None


def _is_composed(tensors: list[tuple[str, Tensor]]) -> bool:
    """Whether a tensor looks like floats, and is made of integers: a tensor subclass of a quantizer."""
    return any(inner.dtype not in _ORDINARY for _, tensor in tensors for inner in _inner(tensor))


def _inner(tensor: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors inside a tensor subclass, by torch's protocol for them."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or depth == 0:
        return
    for name in flatten()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            yield part
            yield from _inner(part, depth - 1)


def _is_unknown(module: nn.Module, homes: set[str]) -> bool:
    """Whether a layer with a matrix comes neither from torch nor from the package of the model's own classes."""
    home = type(module).__module__.partition(".")[0]
    if home in homes | {"torch", "transformers", "peft", "accelerate"}:
        return False
    return isinstance(module, nn.Linear) or any(tensor.dim() > 1 for _, tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters and buffers."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield name, tensor


def _is_plain(module: nn.Module) -> bool:
    """Whether the state of a layer is its own parameters and buffers, all of them ordinary tensors."""
    own = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return all(name in own and type(value) in (Tensor, nn.Parameter) for name, value in module.state_dict().items())


def _is_inside(name: str, layer: str) -> bool:
    return not layer or name.startswith(f"{layer}.")
