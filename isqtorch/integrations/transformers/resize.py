"""`resize_token_embeddings` of models whose table or head is packed: kept rows keep their bytes, new rows are packed.

transformers builds the larger table in two methods of PreTrainedModel, from the weights of the old one. They are wrapped
here: they get the decoded layer, and what they add is packed in the layer's format. If transformers renames them,
`install` raises, and test_resized_tables notices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from isqtorch.modules import PackedModule, QuantEmbedding, QuantLinear
from isqtorch.modules.convert import float_weight, to_float
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.modules.parameter import PackedParameter, name_packed

_METHODS = ("_get_resized_embeddings", "_get_resized_lm_head")


def install() -> None:
    """Wrap the two methods, once in a process."""
    for name in _METHODS:
        method = getattr(PreTrainedModel, name)
        if not hasattr(method, "_isqtorch_wrapped"):
            setattr(PreTrainedModel, name, _wrapped(method))


def _wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def resized(self: Any, old: nn.Module, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
        if not isinstance(old, (QuantEmbedding, QuantLinear)):
            return method(self, old, new_num_tokens, *args, **options)
        ordinary = to_float(old, float_weight(old))
        new = method(self, ordinary, new_num_tokens, *args, **options)
        _take_rows(old, new)
        name_packed(self)
        return old

    resized._isqtorch_wrapped = method  # type: ignore[attr-defined]
    return resized


def _take_rows(layer: QuantEmbedding | QuantLinear, new: Any) -> None:
    """Give a packed layer the rows that an ordinary one has more or less than it."""
    weight = new.weight.t() if isinstance(layer, QuantLinear) and layer.is_turned() else new.weight
    assert isinstance(layer, PackedModule)
    rows, kept = weight.shape[0], min(weight.shape[0], layer.weight.shape[0])
    with ordinary_tensors():
        packed = layer._parameters["weight"].data[:kept]  # type: ignore[union-attr]
        if rows > kept:
            added = torch.ops.isqtorch.quantize(weight.detach()[kept:].contiguous(), layer.format, None, None)
            packed = torch.cat([packed, added])
        elif rows == layer.weight.shape[0]:
            return
        layer.weight = PackedParameter(packed.clone())
    if isinstance(layer, QuantEmbedding):
        layer.num_embeddings, layer.padding_idx = rows, new.padding_idx
    else:
        layer.out_features, layer.bias = rows, new.bias
