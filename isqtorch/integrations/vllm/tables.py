"""How vLLM's token tables and output heads hold and use packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .formats import Kind, Layer
from .linear import IsqLinearMethod


class IsqTableMethod(IsqLinearMethod):
    """A token table or an output head. A table that the head shares computes the logits, too."""

    kind: Kind = "embedding"

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        fmt = self.runs[0].format
        if fmt is None:
            return nn.functional.embedding(ids, layer.weight)
        rows: Tensor = torch.ops.isqtorch.embedding(ids, layer.weight, fmt.name, self.dtype)
        return rows

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The table takes the place of the head. So the head has no weight that would have to follow the table's."""
        return embed_tokens

    def _layer(self, path: str, shape: tuple[int, ...], columns: int) -> Layer:
        return Layer(path, "embedding", shape, columns, self.dtype, "embedding")


class IsqHeadMethod(IsqTableMethod):
    """An output head with a weight of its own."""

    def _layer(self, path: str, shape: tuple[int, ...], columns: int) -> Layer:
        return Layer(path, "linear", shape, columns, self.dtype, "head")
