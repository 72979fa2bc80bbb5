"""LayerInfo: what the policy knows about one weight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from isqtorch.formats import QuantFormat, get_format

Role = Literal["", "embedding", "head"]


_HEAD = re.compile(r"(?:^|\.)(?:lm_head(?:\.decoder)?|embed_out|output_projection|predictions\.decoder)$|^proj_out$")
_EMBEDDING = re.compile(
    r"(?:^|_)(?:embed|embeddings?)(?:_(?:tokens?|in|positions?|tokens_per_layer))?$"
    r"|^(?:wte|wpe|wtte|shared|relative_attention_bias)$"
)


@dataclass(frozen=True)
class LayerInfo:
    """What the policy knows about one weight.

    `keep` is a reason not to quantize that the module itself gives (a convolution, a patched forward, ...).
    """

    name: str  # module path, followed by the parameter's name if that is not "weight"
    kind: Literal["linear", "embedding", "experts", "other"]
    shape: tuple[int, ...]  # [N, K] for layers, [E, N, K] for experts, whatever the layout in memory
    dtype: torch.dtype  # of the weight; of the layer where the weight is packed
    role: Role = ""
    tied_to: str | None = None  # the first layer with the same weight
    device_type: str = "cpu"
    keep: str | None = None
    packed_as: str | None = None  # its format, where the weight is packed already
    block: str | None = None  # experts: the path of their module
    stored_as: tuple[str, ...] = ()  # formats that hold exactly what another program has quantized it to

    @property
    def holder(self) -> str:
        """Name of the layer that holds the weight: this one, or the first of those that share it."""
        return self.tied_to or self.name

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes now; 0 if it is the weight of another layer."""
        if self.tied_to is not None:
            return 0
        if self.packed_as is not None:
            return self.packed_bytes(get_format(self.packed_as))
        return self.numel * self.dtype.itemsize

    def packed_bytes(self, fmt: QuantFormat) -> int:
        """Bytes of the weight in a format."""
        return prod(self.shape[:-1]) * fmt.row_bytes(self.shape[-1])


def head_by_name(name: str) -> bool:
    """Whether a linear layer of this name is an output head, judged by the names that models use."""
    return _HEAD.search(name) is not None


def embedding_by_name(name: str) -> bool:
    """Whether a weight of this name is a token or position table, judged by the names that models use."""
    return _EMBEDDING.search(name.rpartition(".")[2]) is not None
