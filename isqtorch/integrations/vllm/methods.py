"""How vLLM's layers hold and use packed weights.

vLLM cuts and merges weights while it loads them: outputs along dimension 0, inputs along dimension 1. Packed rows may
be cut and joined like float rows, and a row may be cut between blocks. So vLLM's own loaders work for packed weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

import isqtorch.ops  # noqa: F401  (registers torch.ops.isqtorch)
from isqtorch.formats import QuantFormat
from isqtorch.inplace.damage import damage, damage_alarms, damage_reason
from isqtorch.text import cause

_DIMENSIONS = {"input_dim": 1, "output_dim": 0}


class _Method(LinearMethodBase):  # type: ignore[misc]  # vLLM is not a dependency
    """Base of the methods for a layer with one weight. Each process of a tensor-parallel group has a part of it."""

    format: QuantFormat | None  # None: the weight stays float

    def _empty(self, rows: int, columns: int, all_columns: int, dtype: torch.dtype) -> Tensor:
        """An empty tensor `[rows, ...]` for the values of the checkpoint.

        Args:
            rows: number of rows of this process.
            columns: number of columns of this process.
            all_columns: number of columns of the whole layer.
            dtype: type in which the model computes.
        """
        raise NotImplementedError

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        empty = self._empty(sum(output_partition_sizes), input_size_per_partition, input_size, params_dtype)
        weight = nn.Parameter(empty, requires_grad=False)
        set_weight_attrs(weight, {**_DIMENSIONS, **extra_weight_attrs})
        layer.register_parameter("weight", weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.format is None:
            return nn.functional.linear(x, layer.weight, bias)
        y: Tensor = torch.ops.isqtorch.linear(x, layer.weight, self.format.name, bias)
        return y


class IsqLinearMethod(_Method):
    """A linear layer whose weights are packed in the checkpoint."""

    format: QuantFormat

    def __init__(self, fmt: QuantFormat, prefix: str) -> None:
        self.format = fmt
        self.prefix = prefix

    def _empty(self, rows: int, columns: int, all_columns: int, dtype: torch.dtype) -> Tensor:
        if columns % self.format.block:
            raise ValueError(
                f"isq in vLLM: {self.prefix} is {self.format.name} with {all_columns} columns, of which this process gets "
                f"{columns}, not a multiple of its block of {self.format.block}. Use another tensor-parallel size, or "
                "pack this layer in a format with smaller blocks."
            )
        return torch.empty(rows, self.format.row_bytes(columns), dtype=torch.uint8)


class IsqEmbeddingMethod(IsqLinearMethod):
    """A token embedding or output head that is packed in the checkpoint."""

    def __init__(self, fmt: QuantFormat, prefix: str) -> None:
        super().__init__(fmt, prefix)
        self.dtype = torch.get_default_dtype()  # vLLM sets it to the model's type while it builds the layers

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        rows: Tensor = torch.ops.isqtorch.embedding(ids, layer.weight, self.format.name, self.dtype)
        return rows


class IsqOnlineMethod(_Method):
    """A linear layer whose float weight is packed once it is completely loaded."""

    def __init__(self, decide: Callable[[tuple[int, int], torch.dtype], QuantFormat | None], prefix: str) -> None:
        self.decide = decide
        self.prefix = prefix
        self.format = None

    def _empty(self, rows: int, columns: int, all_columns: int, dtype: torch.dtype) -> Tensor:
        self.format = self.decide((rows, columns), dtype)
        return torch.empty(rows, columns, dtype=dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.format is None or layer.weight.dtype == torch.uint8:  # stays float, or vLLM called this before
            return
        try:
            packed = torch.ops.isqtorch.quantize(layer.weight.data, self.format.name)
        except ValueError as error:
            raise ValueError(f"isq in vLLM: {self.prefix}: {cause(error)}") from None
        found = damage(layer.weight.data, packed, self.format)
        if found is not None:
            reasons = {f"{self.prefix} ({self.format.name})": damage_reason([found], self.format)}
            for message in damage_alarms(reasons, "isq in vLLM"):
                warnings.warn(message, stacklevel=2)
        layer.weight = nn.Parameter(packed, requires_grad=False)
