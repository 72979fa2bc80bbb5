"""Blocks for a float model whose checkpoint another program has quantized, such as gpt-oss, which is stored in MXFP4.

transformers decodes such a checkpoint where it has no kernels for it. A number of bits then takes over the blocks of
the files, instead of rounding the decoded floats again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from isqtorch.formats import QuantFormat, number_of_bits
from isqtorch.modules.convert import owner_of, parameter_name, weight_matrix
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.request import Request

from .host import files_of, open_source
from .source import Source, quantization_of

_AT_ONCE = 1 << 20  # weights that are compared at a time


@dataclass
class Taken:
    """The blocks of the checkpoint of a float model.

    Attributes:
        bits: the number of bits that is asked for.
        same: layers whose floats are those of the checkpoint.
    """

    model: nn.Module
    source: Source
    bits: int
    same: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module, request: Request) -> Taken | None:
        """Open the checkpoint; None if no bits are asked for, or it is not quantized."""
        bits = number_of_bits(request.fmt)
        if bits is None:
            return None
        files = files_of(model)
        try:
            if not files or quantization_of(Path(files[0]).parent) is None:
                return None
            return cls(model, open_source(model, files), bits)
        except (OSError, ValueError, NotImplementedError):
            return None  # the model is packed from its own floats, and `Origin` notes why the files cannot be read

    def described(self, inventory: Inventory) -> Inventory:
        """The inventory with the formats that hold exactly what the checkpoint has and the model still has.

        Every weight is compared, which takes about as long as packing it.
        """
        exact: dict[str, tuple[str, ...]] = {}
        for layer in inventory.layers:
            if layer.kind != "other" and layer.keep is None and not exact.get(layer.holder):
                name = parameter_name(self.model, layer.name)
                module, leaf = owner_of(self.model, layer.name)
                weight, stored = weight_matrix(module, leaf).detach(), module._parameters[leaf]
                turned = stored is not None and weight.stride() != stored.stride()
                formats = [fmt for fmt in self.source.exact(name, turned) if fmt.bits == self.bits]
                exact[layer.holder] = tuple(
                    fmt.name for fmt in formats if self._is_stored(layer.name, name, fmt, weight)
                )
                self.source.release()
        layers = [replace(layer, stored_as=exact.get(layer.holder, ())) for layer in inventory.layers]
        return replace(inventory, layers=layers)

    def blocks(self, names: Sequence[str], fmt: QuantFormat) -> Tensor | None:
        """The blocks of a weight; None if the checkpoint has none in this format.

        Args:
            names: of all layers that share the weight.
            fmt: the format.
        """
        found = (self.source.packed(parameter_name(self.model, layer), fmt) for layer in names if layer in self.same)
        return next((blocks for blocks in found if blocks is not None), None)

    def _is_stored(self, layer: str, name: str, fmt: QuantFormat, weight: Tensor) -> bool:
        blocks = self.source.packed(name, fmt)
        same = blocks is not None and _holds(blocks, fmt, weight)
        if same:
            self.same.add(layer)
        return same


def _holds(blocks: Tensor, fmt: QuantFormat, weight: Tensor) -> bool:
    """Whether blocks are exactly these floats, in the type of the floats."""
    *rows, columns = weight.shape
    if tuple(blocks.shape) != (*rows, fmt.row_bytes(columns)):
        return False
    step = max(1, _AT_ONCE // columns)
    for matrix, packed in zip(weight, blocks, strict=True) if weight.dim() == 3 else [(weight, blocks)]:
        for start in range(0, matrix.shape[0], step):
            part = slice(start, start + step)
            decoded = torch.ops.isqtorch.dequantize(packed[part].to(matrix.device), fmt.name, torch.float32)
            if not torch.equal(decoded.to(matrix.dtype), matrix[part]):
                return False
    return True
