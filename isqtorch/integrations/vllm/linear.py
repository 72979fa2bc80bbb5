"""How vLLM's linear layers hold and use packed weights.

vLLM cuts and merges weights while it loads them: outputs along dimension 0, inputs along dimension 1. Packed rows may
be cut and joined like float rows, and a row may be cut between blocks. So vLLM's own loaders work for packed weights.

A merged layer has several parts: q, k and v, or gate and up. Parts may have different formats, and rows of different
lengths. While the layer is loaded, its weight is as wide as the widest part. Afterwards, neighbours of the same format
are one weight: `weight`, then `weight_1`, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from isqtorch.formats import QuantFormat

from .formats import OP, Formats, Kind, Layer
from .packing import packed

DONE = "_already_called_process_weights_after_loading"  # vLLM's name; it removes the mark when it loads a layer again
_QKV = {"q": 0, "k": 1, "v": 2}


class Part(NamedTuple):
    """A layer of the checkpoint within a layer of vLLM. Without a format it is float."""

    path: str
    format: QuantFormat | None
    rows: int


class Run(NamedTuple):
    """Neighbouring parts of one format: the parameter `name` of vLLM's layer."""

    name: str
    parts: tuple[Part, ...]

    @property
    def format(self) -> QuantFormat | None:
        return self.parts[0].format

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


class IsqLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is not a dependency
    """A linear layer. Its weights are packed in the checkpoint, or once they are loaded."""

    kind: Kind = "linear"

    def __init__(self, formats: Formats, paths: Sequence[str], prefix: str) -> None:
        """Args:
        formats: of the model's layers.
        paths: the layers of the checkpoint that vLLM merges into this one.
        prefix: vLLM's name of the layer, for messages.
        """
        self.formats, self.paths, self.prefix = formats, paths, prefix
        self.uses_meta_device = formats.online
        self.parts: list[Part] = []
        self.runs: list[Run] = []
        self.dtype = torch.float32

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
        # vLLM calls this with positions and with names: the names of the parameters are part of the interface.
        columns = input_size_per_partition
        self.dtype = params_dtype
        self.parts = self._divided(output_partition_sizes, columns, input_size)
        self.runs = _runs(self.parts)
        rows = sum(output_partition_sizes)
        attributes = {"input_dim": 1, "output_dim": 0, **extra_weight_attrs}
        if self.formats.online:
            empty = torch.empty(rows, columns, dtype=params_dtype, device="meta")
        else:
            self.widths = [self._row_bytes(part, columns) for part in self.parts]
            empty = torch.empty(rows, max(self.widths), dtype=torch.uint8)
            # vLLM looks for bound methods of the layer among these attributes when it loads a model again.
            attributes.update(stock_loader=attributes.get("weight_loader"), weight_loader=self.load)
        weight = nn.Parameter(empty, requires_grad=False)
        set_weight_attrs(weight, attributes)
        layer.register_parameter("weight", weight)
        if self.formats.online:
            initialize_online_processing(layer)  # vLLM makes the weight real when all its values are there

    def load(self, param: Any, loaded_weight: Tensor, loaded_shard_id: Any = None) -> Any:
        """Take one tensor of the checkpoint: vLLM's own loader puts it into the columns that its part has."""
        part = self._part_of(loaded_shard_id)
        fmt, path = self.parts[part].format, self.parts[part].path
        if (fmt is not None) != (loaded_weight.dtype == torch.uint8):
            raise ValueError(
                f"{OP}: config.json says that {path} is {fmt.name if fmt else 'float'}, but the checkpoint has "
                f"{str(loaded_weight.dtype).removeprefix('torch.')} values for it. The checkpoint is damaged, or its config.json is "
                "that of another model."
            )
        if fmt is None:
            loaded_weight = loaded_weight.to(self.dtype).contiguous().view(torch.uint8)
        columns = param
        if param.shape[1] != self.widths[part]:
            columns = nn.Parameter(param.data[:, : self.widths[part]], requires_grad=False)
            set_weight_attrs(columns, {"input_dim": 1, "output_dim": 0})
        shard = () if loaded_shard_id is None else (loaded_shard_id,)
        return param.stock_loader(columns, loaded_weight, *shard)

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, DONE, False):
            return
        setattr(layer, DONE, True)
        if len(self.runs) == 1 and self.runs[0].format is not None and not self.formats.online:
            return  # the weight is what was loaded
        weight: Tensor = layer.weight.data
        rows = weight.split([part.rows for part in self.parts])
        values = [self._finished(number, own) for number, own in enumerate(rows)]
        del layer.weight, weight, rows
        for run in self.runs:
            own = [value for value, part in zip(values, self.parts, strict=True) if part in run.parts]
            tensor = own[0] if len(own) == 1 else torch.cat(own)
            layer.register_parameter(run.name, nn.Parameter(tensor, requires_grad=False))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        biases = [None] * len(self.runs) if bias is None else bias.split([run.rows for run in self.runs])
        products = [
            _product(x, getattr(layer, run.name), run.format, own) for run, own in zip(self.runs, biases, strict=True)
        ]
        return products[0] if len(products) == 1 else torch.cat(products, -1)

    def dequantize_weight(self, layer: Any) -> Tensor:
        """The decoded weight `[N, K]`. vLLM asks for it where it packs a layer in another way."""
        runs = [(getattr(layer, run.name), run.format) for run in self.runs]
        return torch.cat(
            [w if fmt is None else torch.ops.isqtorch.dequantize(w, fmt.name, self.dtype) for w, fmt in runs]
        )

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _divided(self, sizes: list[int], columns: int, all_columns: int) -> list[Part]:
        """The parts of the layer, each with the format of its layer in the checkpoint."""
        together = len(self.paths) != len(sizes)  # stored as one matrix, or as fewer than vLLM counts
        rows = [sum(sizes)] * len(self.paths) if together else sizes
        parts = [
            Part(path, self.formats.of(self._layer(path, (n, columns), all_columns)), n)
            for path, n in zip(self.paths, rows, strict=True)
        ]
        if not together:
            return parts
        if any(part.format is not parts[0].format for part in parts):
            listed = ", ".join(f"{part.path}: {part.format.name if part.format else 'float'}" for part in parts)
            raise ValueError(
                f"{OP}: vLLM merges these layers into {self.prefix} in {len(sizes)} parts, so they need one format: {listed}. Give them "
                "the same format by a topology."
            )
        return parts[:1]

    def _layer(self, path: str, shape: tuple[int, ...], columns: int) -> Layer:
        return Layer(path, self.kind, shape, columns, self.dtype)

    def _row_bytes(self, part: Part, columns: int) -> int:
        return columns * self.dtype.itemsize if part.format is None else part.format.row_bytes(columns)

    def _part_of(self, shard: Any) -> int:
        """The part that vLLM's name of a shard means."""
        if len(self.parts) == 1:
            return 0
        number = _QKV.get(shard, shard)
        if isinstance(number, int):
            return number
        formats = {part.format for part in self.parts}
        if len(formats) > 1:
            raise ValueError(
                f"{OP}: the checkpoint has one matrix for {self.prefix}, whose parts have several formats. Give them the same format "
                "by a topology."
            )
        return 0

    def _finished(self, number: int, rows: Tensor) -> Tensor:
        """The rows of a part, as they are kept."""
        part = self.parts[number]
        if self.formats.online:
            return rows.clone() if part.format is None else packed(rows, part.format, part.path)
        own = rows[:, : self.widths[number]]
        return own if part.format is not None else own.contiguous().view(self.dtype)


def _runs(parts: Sequence[Part]) -> list[Run]:
    grouped = [tuple(run) for _, run in groupby(parts, key=lambda part: part.format and part.format.name)]
    return [Run(f"weight_{i}" if i else "weight", run) for i, run in enumerate(grouped)]


def _product(x: Tensor, weight: Tensor, fmt: QuantFormat | None, bias: Tensor | None) -> Tensor:
    if fmt is None:
        return nn.functional.linear(x, weight, bias)
    y: Tensor = torch.ops.isqtorch.linear(x, weight, fmt.name, bias)
    return y
