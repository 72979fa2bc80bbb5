"""The float weights that adapters are added to: those of the checkpoint, if they are the layer's, or the decoded ones."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any, NamedTuple, cast, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from isqtorch.formats import get_format
from isqtorch.inplace.origin import Origin
from isqtorch.inplace.pack import relative_error
from isqtorch.inplace.weights import STORED, Weights
from isqtorch.modules import PackedModule
from isqtorch.modules.convert import float_shape
from isqtorch.quantizers import Rule, has_rule, needs_whole

from .record import unmerged

_SAMPLE = 8  # least number of rows by which a layer is compared with the checkpoint
_CLOSE = 1.25  # the error of packed rows over that of freshly packed ones, if they were packed from the same floats


class Floats(NamedTuple):
    """The float weight of a packed layer."""

    weight: Tensor  # [N, K]; the caller may write to it
    rule: str | None  # the rule that packs it as the layer was packed
    original: bool  # whether it is that of the checkpoint, and not decoded


class FloatWeights:
    """The float weights of a model's packed layers.

    Attributes:
        why: reason for decoding a layer.
        unlike: names of layers that were packed in another way than the checkpoint's weights are packed by default.

    Raises:
        ValueError: the source that the user named does not fit the model, or there is no model to find names in.
        OSError: its files cannot be read.
    """

    def __init__(self, model: nn.Module | None, source: str | os.PathLike[str] | None) -> None:
        self.why = "where they came from is not known here"
        self.unlike: list[str] = []
        self._source = source
        self._names: dict[int, list[str]] = {}  # id of a layer -> its names without PEFT's parts
        self._sharing: dict[int, list[str]] = {}  # id of a weight -> names of the layers that have it
        self._plain = None if model is None else without_adapters(model)
        self._weights: Weights | None = None
        if self._plain is None:
            if source not in (None, STORED):
                raise ValueError(
                    "merge: merging(source=...) needs the names of the layers. Merge the model, with merge_adapter() or "
                    "merge_and_unload(), and not a layer by itself."
                )
            self.why = "a layer that merges by itself has no name to find them by"
            return
        for name, module in self._plain.named_modules(remove_duplicate=False):
            if isinstance(module, PackedModule):
                self._names.setdefault(id(module), []).append(name)
                for leaf in module.packed:  # a tied weight may be stored under any of its names
                    self._sharing.setdefault(id(module._parameters[leaf]), []).append(name)
        self._weights = self._find(self._plain)

    def _find(self, plain: nn.Module) -> Weights | None:
        """The checkpoint, or None if the weights are decoded."""
        asked, origin = self._source, Origin.of(plain) or Origin()
        if asked == STORED:
            self.why = "the decoded ones were asked for"
            return None
        if asked is None and not origin.files:
            return None
        try:
            weights = Weights.find(plain, asked, origin)
        except (ValueError, OSError) as error:
            message = str(error).removeprefix("requantize_: ")
            if asked is not None:
                raise type(error)(f"merge: {message}") from None
            self.why = message.split(". Give source")[0]
            return None
        for alarm in weights.alarms:
            warnings.warn(alarm.replace("requantize_", "merge", 1), stacklevel=8)
        return weights

    def name_of(self, layer: PackedModule) -> str:
        """The layer's name for messages."""
        names = self._names.get(id(layer))
        return names[0] if names else f"a layer of {list(float_shape(layer))}"

    def is_tied(self, weight: Tensor) -> bool:
        """Whether several layers have this packed weight."""
        return len(self._sharing.get(id(weight), ())) > 1

    def free(self, layer: PackedModule) -> None:
        """Keep no reference to a layer whose weight is not needed any more. A tied weight is, for its other layers."""
        if self._plain is None or any(self.is_tied(cast(Tensor, layer._parameters[leaf])) for leaf in layer.packed):
            return
        for name in self._names.get(id(layer), ()):
            path, _, leaf = name.rpartition(".")
            self._plain.get_submodule(path)._modules[leaf] = None

    def of(self, layer: PackedModule) -> Floats:
        """The float weight of a packed layer: that of the checkpoint, or decoded."""
        packed = cast(Tensor, layer._parameters["weight"])
        if self._weights is not None and id(layer) in self._names:
            found = self._read(self._weights, layer, packed)
            if found is not None:
                return found
        decoded: Tensor = torch.ops.isqtorch.dequantize(packed, layer.format, torch.float32)
        return Floats(decoded, None, False)

    def _read(self, weights: Weights, layer: PackedModule, packed: Tensor) -> Floats | None:
        """The weight of the checkpoint, or None if it is not that of the layer."""
        names = self._sharing[id(packed)]
        try:
            weight = weights.of(names).to(packed.device, copy=True, memory_format=torch.contiguous_format)
        except (ValueError, OSError) as error:
            message = str(error).removeprefix("requantize_: ")
            if self._source is not None:
                raise type(error)(f"merge: {message}") from None
            self.why = message.split(". Give source")[0]
            return None
        finally:
            weights.release()
        return self._compared(weight, layer, packed)

    def _compared(self, weight: Tensor, layer: PackedModule, packed: Tensor) -> Floats | None:
        """Find out from a few rows how the layer was packed: nothing records rule and importance."""
        fmt = get_format(layer.format)
        step = 1 if needs_whole(fmt) else max(1, weight.shape[0] // _SAMPLE)
        rows, stored = weight[::step].contiguous(), packed[::step].contiguous()
        for rule in (None, *get_args(Rule)):
            if has_rule(fmt, rule) and torch.equal(torch.ops.isqtorch.quantize(rows, fmt.name, None, rule), stored):
                return Floats(weight, rule, True)
        fresh = relative_error(rows, torch.ops.isqtorch.quantize(rows, fmt.name, None, None), fmt)
        if self._source is None and relative_error(rows, stored, fmt) > _CLOSE * fresh:
            self.why = f"{self.name_of(layer)} was not packed from the weights in the checkpoint"
            return None
        self.unlike.append(self.name_of(layer))
        return Floats(weight, None, True)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model as it was before PEFT: other module objects, with the same parameters, under the old names."""
    copies: dict[int, nn.Module] = {}

    def plain(module: nn.Module) -> nn.Module:
        while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inner: Any = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
            module = inner
        if isinstance(module, PackedModule):
            return unmerged(module)
        if id(module) not in copies:
            copies[id(module)] = twin = copy.copy(module)
            twin._modules = {name: None if child is None else plain(child) for name, child in module._modules.items()}
        return copies[id(module)]

    return plain(model)
