"""Ties between a packed table and a head: the head is the table, packed.

transformers ties two layers by setting the parameter of one in the other. That is right for two float layers and for
two packed layers of one format. If a packed trunk gets a head of another class, or a packed model a new float table,
one of them has to change its kind as well.

This wraps PreTrainedModel.tie_weights, which runs in `from_pretrained` after the weights are loaded, and whenever a
user ties. It breaks if transformers renames it; the import fails then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from isqtorch.formats import get_format
from isqtorch.integrations.record import METHOD
from isqtorch.modules import PackedModule, QuantEmbedding, QuantLinear
from isqtorch.modules.convert import layer_kind, name_of, obstacle, to_float, to_packed

_TIE = "tie_weights"


class _Packed(NamedTuple):
    """A packed weight before tying."""

    parameter: Tensor  # kept, so that its id stays its own
    name: str
    format: str
    dtype: torch.dtype
    trainable: bool


def follow_ties(changed: Callable[[Any], None]) -> None:
    """Make `tie_weights` of all transformers models convert the layers that it ties to packed ones, or to float ones.

    Args:
        changed: called with a model whose layers have been converted. It is not called in `from_pretrained`, which makes
            its record of the model when all is loaded.
    """
    original = getattr(PreTrainedModel, _TIE)
    if getattr(original, "_isqtorch", False):
        return

    @wraps(original)
    def tie_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _packed_weights(self)
        result = original(self, *args, **kwargs)
        loading = _is_loading(self)
        if before and _convert(self, before, loading) and not loading:
            changed(self)
        return result

    tie_weights._isqtorch = True  # type: ignore[attr-defined]
    setattr(PreTrainedModel, _TIE, tie_weights)


def _packed_weights(model: nn.Module) -> dict[int, _Packed]:
    """The packed weights of all layers, by the id of the parameter."""
    found: dict[int, _Packed] = {}
    for path, module in model.named_modules():
        for leaf, format in module.packed.items() if isinstance(module, PackedModule) else ():
            weight = module._parameters.get(leaf)
            if weight is not None:
                packed = _Packed(weight, name_of(path, leaf), format, module.dtype, module.origin_requires_grad)
                found.setdefault(id(weight), packed)
    return found


def _is_loading(model: Any) -> bool:
    """Whether `from_pretrained` is at work: it sets the quantizer last."""
    return getattr(model, "quantization_method", None) == METHOD and getattr(model, "hf_quantizer", None) is None


def _convert(model: nn.Module, before: dict[int, _Packed], loading: bool) -> bool:
    """Convert the layers whose kind does not fit the parameter that they have now. Returns whether there were any."""
    news: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        packed = before.get(id(weight))
        if isinstance(module, PackedModule) and loading:
            continue  # config.json gives it a format; the quantizer checks that both have the same
        if packed is not None and (not isinstance(module, PackedModule) or module.packed["weight"] != packed.format):
            news[id(module)] = _packed_layer(path, module, packed)
        elif packed is None and isinstance(module, (QuantLinear, QuantEmbedding)) and weight.is_floating_point():
            news[id(module)] = to_float(module, weight)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in news:
                parent._modules[name] = news[id(child)]
    return bool(news)


def _packed_layer(path: str, module: nn.Module, packed: _Packed) -> nn.Module:
    """The packed form of a layer that was tied to a packed weight.

    Raises:
        ValueError: the layer has no packed form.
    """
    fmt, weight = get_format(packed.format), packed.parameter
    assert isinstance(weight, nn.Parameter)
    if not isinstance(module, PackedModule):
        like = torch.empty(weight.shape[0], fmt.in_features(weight.shape[1]), dtype=packed.dtype, device="meta")
        module._parameters["weight"] = nn.Parameter(like, requires_grad=packed.trainable)
        trouble = obstacle(module) if layer_kind(module) in ("linear", "embedding") else "it has no packed form"
        if trouble is not None:
            module._parameters["weight"] = weight
            raise ValueError(
                f"{METHOD}: {path} ({type(module).__name__}) is tied to {packed.name}, which is packed as {packed.format}: {trouble}. "
                "Call dequantize_ first, or set tie_word_embeddings=False in the config."
            )
    return to_packed(module, weight, fmt)
