"""The float weights that requantize_ starts from: of the checkpoint, of the model itself, or decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from isqtorch.formats import QuantFormat, get_format
from isqtorch.modules import PackedModule
from isqtorch.modules.convert import float_shape, owner_of, parameter_name, weight_matrix
from isqtorch.modules.plausible import weight_fault
from isqtorch.ops.native import NATIVE_DEVICES
from isqtorch.policy.inventory import Inventory

from .host import open_source
from .origin import Origin
from .source import Source, difference, files_in
from .vectors import originals

STORED = "stored"
_WAYS_OUT = (
    "Give source=..., the folder, .safetensors or .gguf file with the model's weights, or source='stored' to start from the "
    "quantized weights, whose errors then stay"
)


@dataclass
class Weights:
    """The float weights of the layers to pack: the own weight of a float layer, the source's weight of a packed layer.

    Attributes:
        model: the model.
        source: the checkpoint; None: packed weights are decoded.
        files: the files of the checkpoint, to remember them in `Origin`.
        trouble: see `Origin`.
        notes: for the report.
        alarms: warnings for the user.
        op: name of the public function, for messages.
        ways_out: what the user can do if a weight is not there.
    """

    model: nn.Module
    source: Source | None
    files: tuple[str, ...]
    trouble: str | None = None
    notes: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    op: str = "requantize_"
    ways_out: str = _WAYS_OUT

    @classmethod
    def find(
        cls,
        model: nn.Module,
        source: str | os.PathLike[str] | None,
        origin: Origin,
        op: str = "requantize_",
        ways_out: str = _WAYS_OUT,
    ) -> Weights:
        """Find the weights from the `source` argument of `requantize_` and the origin of the model.

        Args:
            model, source, origin: see `requantize_`.
            op: name of the public function, for messages.
            ways_out: what the user can do if the weights are not known.

        Raises:
            ValueError: the source is not known, or its weights are not those of the model.
            OSError: a file cannot be read.
        """
        if source == STORED:
            note = "made from the quantized weights: their errors stay, and more bits gain nothing"
            return cls(model, None, origin.files, origin.trouble, [note])
        if source is None and not origin.files:
            raise ValueError(f"{op}: it is not known where the model's weights came from. {ways_out}.")
        if source is None and origin.trouble is not None:
            folder = os.path.dirname(origin.files[0])
            raise ValueError(f"{op}: {folder} cannot stand for the model's weights: {origin.trouble}. {ways_out}.")
        files = origin.files if source is None else files_in(source, op)
        opened = open_source(model, files, files == origin.files)
        about = f": {opened.note}" if opened.note else ""
        note = f"made from the weights in {opened.where}{about}"
        weights = cls(model, opened, files, notes=[note], op=op, ways_out=ways_out)
        changed = difference(model, opened, originals(model))
        if changed is not None:
            finding = f"{changed} is not what {opened.where} has: the model was changed since, or it is another one's checkpoint"
            if source is None:
                raise ValueError(f"{op}: {finding}. {ways_out}.")
            weights.alarms.append(f"{op}: {finding}; the parameters that are not quantized stay as they are")
        return weights

    def of(self, names: Sequence[str]) -> Tensor:
        """The float weight `[N, K]` or `[E, N, K]`, on the device where it is packed. Do not write to it.

        Args:
            names: names of all layers that share the weight.

        Raises:
            ValueError: the source does not have the weight, or has it in another shape.
            OSError: the file cannot be read.
        """
        module, leaf = owner_of(self.model, names[0])
        own = cast(Tensor, module._parameters[leaf])
        if not isinstance(module, PackedModule) or leaf not in module.packed:
            return weight_matrix(module, leaf).detach()
        self.release()  # frees the previous weight's pages
        if self.source is None:
            decoded: Tensor = torch.ops.isqtorch.dequantize(own, module.packed[leaf], torch.float32)
            return decoded
        weight = self._read(self.source, names, module, leaf).to(module.dtype)
        if own.device.type in NATIVE_DEVICES:  # on other devices, packing on the CPU and copying is faster
            weight = weight.to(own.device)
        return weight.transpose(-2, -1) if module.is_turned() else weight

    def as_before(self, names: Sequence[str]) -> Tensor:
        """The float weight of a packed layer as `of`, but as the layer that it replaced stored it: of a Conv1D `[K, N]`."""
        module, _ = owner_of(self.model, names[0])
        weight = self.of(names)
        turned = isinstance(module, PackedModule) and module.is_turned()
        return weight.transpose(-2, -1) if turned and self.source is not None else weight

    def described(self, inventory: Inventory) -> Inventory:
        """The inventory with the formats that hold exactly what another program has quantized in the source."""
        if self.source is None:
            return inventory
        exact: dict[str, tuple[str, ...]] = {}
        for layer in inventory.layers:
            if layer.packed_as is not None and not exact.get(layer.holder):
                module, _ = owner_of(self.model, layer.name)
                turned = isinstance(module, PackedModule) and module.is_turned()
                found = self.source.exact(parameter_name(self.model, layer.name), turned)
                exact[layer.holder] = tuple(fmt.name for fmt in found)
        layers = [replace(layer, stored_as=exact.get(layer.holder, ())) for layer in inventory.layers]
        return replace(inventory, layers=layers)

    def ready(self, names: Sequence[str], fmt: QuantFormat) -> Tensor | None:
        """The packed rows of a weight, if the source has them in this format already; else None.

        Raises:
            ValueError: the source has them in another shape, or the file is damaged.
        """
        module, leaf = owner_of(self.model, names[0])
        if self.source is None or not isinstance(module, PackedModule) or leaf not in module.packed:
            return None
        *rows, row_bytes = cast(Tensor, module._parameters[leaf]).shape
        columns = get_format(module.packed[leaf]).in_features(row_bytes)
        for name in (parameter_name(self.model, layer) for layer in names):
            blocks = self.source.packed(name, fmt)
            if blocks is None:
                continue
            if tuple(blocks.shape) != (*rows, fmt.row_bytes(columns)):
                raise ValueError(
                    f"{self.op}: {name} is {fmt.name} {list(blocks.shape)} in {self.source.where}, another shape than in the model"
                )
            why = weight_fault(blocks, fmt)
            if why is not None:
                raise ValueError(
                    f"{self.op}: {self.source.where}: {name}: its bytes are not {fmt.name}: {why}. The file is damaged."
                )
            return blocks
        return None

    def _read(self, source: Source, layers: Sequence[str], module: PackedModule, leaf: str) -> Tensor:
        names = [parameter_name(self.model, layer) for layer in layers]  # it may be stored under any of them
        shape = float_shape(module, leaf)
        for name in names:
            weight = source.read(name)
            if weight is None:
                continue
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"{self.op}: {name} is {list(weight.shape)} in {source.where}, {list(shape)} in the model. {self.ways_out}, or "
                    "exclude the layer."
                )
            return weight
        raise ValueError(f"{self.op}: {source.where} has no {names[0]}. {self.ways_out}, or exclude the layer.")

    def release(self) -> None:
        """Free the pages of the weight that was read last."""
        if self.source is not None:
            self.source.release()
