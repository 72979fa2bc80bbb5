"""The float weights that requantize_ starts from: those of the checkpoint, of the model itself, or decoded ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from isqtorch.modules import PackedModule
from isqtorch.modules.convert import float_shape, is_turned, owner_of, parameter_name, weight_matrix
from isqtorch.ops.native import NATIVE_DEVICES

from .host import open_source
from .origin import Origin
from .source import Source, difference, files_in

STORED = "stored"
_WAYS_OUT = (
    "Give source=..., the folder or .safetensors file with the model's float weights, or source='stored' to start from the "
    "quantized weights, whose errors then stay"
)


@dataclass
class Weights:
    """The float weight of each layer to be packed: of an ordinary layer its own, of a packed one that of the source.

    Attributes:
        model: the model.
        source: the checkpoint; None: packed weights are decoded.
        files: of the checkpoint, to be remembered.
        trouble: see `Origin`.
        notes: for the report.
        alarms: what the user should be warned of.
    """

    model: nn.Module
    source: Source | None
    files: tuple[str, ...]
    trouble: str | None = None
    notes: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)

    @classmethod
    def find(cls, model: nn.Module, source: str | os.PathLike[str] | None, origin: Origin) -> Weights:
        """Where the weights are, by what the user says and what is remembered; see `requantize_`.

        Raises:
            ValueError: the source is not known, or does not stand for the model's weights.
            OSError: a file that cannot be read.
        """
        if source == STORED:
            note = "made from the quantized weights: their errors stay, and more bits gain nothing"
            return cls(model, None, origin.files, origin.trouble, [note])
        if source is None and not origin.files:
            raise ValueError(f"requantize_: it is not known where the model's weights came from. {_WAYS_OUT}.")
        if source is None and origin.trouble is not None:
            folder = os.path.dirname(origin.files[0])
            raise ValueError(
                f"requantize_: {folder} cannot stand for the model's weights: {origin.trouble}. {_WAYS_OUT}."
            )
        files = origin.files if source is None else files_in(source)
        opened = open_source(model, files, files == origin.files)
        weights = cls(model, opened, files, notes=[f"made from the weights in {opened.where}"])
        changed = difference(model, opened)
        if changed is not None:
            finding = f"{changed} is not what {opened.where} has: the model was changed since, or it is another one's checkpoint"
            if source is None:
                raise ValueError(f"requantize_: {finding}. {_WAYS_OUT}.")
            weights.alarms.append(f"requantize_: {finding}; the parameters that are not quantized stay as they are")
        return weights

    def of(self, names: Sequence[str]) -> Tensor:
        """`[N, K]` or `[E, N, K]`, where it can be packed; not to be written to.

        Args:
            names: of all layers that share the weight.

        Raises:
            ValueError: the source has no such weight, or not in this shape.
            OSError: it cannot be read.
        """
        module, leaf = owner_of(self.model, names[0])
        own = cast(Tensor, module._parameters[leaf])
        if not isinstance(module, PackedModule) or leaf not in module.packed:
            return weight_matrix(module, leaf).detach()
        self.release()  # what was read before
        if self.source is None:
            decoded: Tensor = torch.ops.isqtorch.dequantize(own, module.packed[leaf], torch.float32)
            return decoded
        weight = self._read(self.source, names, module, leaf).to(module.dtype)
        if own.device.type in NATIVE_DEVICES:  # elsewhere packing is slower than both copies
            weight = weight.to(own.device)
        return weight.transpose(-2, -1) if is_turned(module) else weight

    def _read(self, source: Source, layers: Sequence[str], module: PackedModule, leaf: str) -> Tensor:
        names = [parameter_name(self.model, layer) for layer in layers]  # it is stored under any one of them
        shape = float_shape(module, leaf)
        for name in names:
            weight = source.read(name)
            if weight is None:
                continue
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"requantize_: {name} is {list(weight.shape)} in {source.where}, {list(shape)} in the model. {_WAYS_OUT}, or "
                    "exclude the layer."
                )
            return weight
        raise ValueError(f"requantize_: {source.where} has no {names[0]}. {_WAYS_OUT}, or exclude the layer.")

    def release(self) -> None:
        """Let go of what was read last."""
        if self.source is not None:
            self.source.release()
