"""Load a checkpoint that another program has quantized: the loader of transformers sees a checkpoint of floats.

`StoredLoad` replaces the tensors of each quantized weight by one entry with the weight's ordinary name. An entry decodes
its weight when the loader reads it, so all conversions of names and tensors work as for floats. For a weight that is
taken over as it is, the entry gives the packed rows, as in a folder that isqtorch has saved.

transformers decides by the configuration which quantizer loads a model, and reads the files itself. So two functions of
its module `modeling_utils` are wrapped. If they are renamed, `install` raises, and every test with transformers
notices.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping

from isqtorch.files.tensors import TensorStore
from isqtorch.formats import KEEP, QuantFormat, mix_name, repacked_as
from isqtorch.formats.stored import StoredWeight, method_of
from isqtorch.inplace.pack import Job
from isqtorch.inplace.stored import QuantizedFiles
from isqtorch.integrations.record import METHOD
from isqtorch.modules.convert import matrices, parameter_name
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.request import Assigned, Request
from isqtorch.report.report import QuantReport

from .config import IsqConfig
from .source import Group, grouped, is_joined, is_turned

_KEPT = "the blocks of the checkpoint, not rounded again"


@dataclass(frozen=True)
class Holding:
    """How the checkpoint holds a parameter of the model.

    Attributes:
        weights: the weights that are joined to it; one of them for most parameters.
        formats: the formats whose blocks hold it exactly, that with the fewest bits first.
        why: the reason, if there are none.
    """

    weights: tuple[StoredWeight, ...]
    formats: tuple[QuantFormat, ...]
    why: str = ""

    @property
    def what(self) -> str:
        """The method, for messages."""
        return self.weights[0].what

    @property
    def instead(self) -> QuantFormat:
        """The next better format: what it adds to the error of the checkpoint is small."""
        return repacked_as(max(weight.bits for weight in self.weights))


@dataclass
class StoredLoad:
    """The quantized weights of a checkpoint that is loaded.

    Attributes:
        quantized: reads them.
        holdings: {name of a parameter: how the checkpoint holds it}.
        kept: {name of a parameter that is taken over as it is: its job}.
    """

    model: Any
    quantized: QuantizedFiles
    groups: dict[str, Group]
    holdings: dict[str, Holding]
    kept: dict[str, Job] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: Any,
        entry: Mapping[str, Any],
        files: Sequence[str],
        key_mapping: Mapping[str, str] | None = None,
    ) -> StoredLoad:
        """Read the headers of a checkpoint.

        Args:
            model: the model before any layer is packed.
            entry: the `quantization_config` of the checkpoint.
            files: its safetensors files.
            key_mapping: as the user gave it to `from_pretrained`.

        Raises:
            ValueError: the files are of another kind, or damaged.
            NotImplementedError: the method is not read here.
            OSError: a file cannot be read.
        """
        if not files:
            raise ValueError(
                f"{METHOD}: the checkpoint is quantized by {entry.get('quant_method')!s:.80}, and only safetensors files of such "
                "checkpoints are read. Convert its files."
            )
        try:
            quantized = QuantizedFiles(TensorStore([Path(file) for file in files]), entry)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"IsqConfig: {error}") from None
        groups, first = grouped(model, quantized.tensors(), get_model_conversion_mapping(model, key_mapping))
        holdings = {}
        for name in first:
            weights = [quantized.weights.get(key) for _, key in groups[first[name]].collected]
            if any(weights):
                holdings[name] = _holding(model, name, groups[first[name]], weights, quantized)
        quantized.release()
        return cls(model, quantized, groups, holdings)

    # ---- decisions ---------------------------------------------------------------------------------------------------

    def assigned(self, inventory: Inventory) -> dict[str, Assigned]:
        """The formats of the rule "keep", by layer."""
        given = {}
        held = self._held(inventory)
        for layer in inventory.layers:
            holding = held.get(layer.holder)
            if holding is None or layer.kind == "other":
                continue
            if holding.formats:
                given[layer.name] = Assigned(holding.formats[0].name, "")
            else:
                given[layer.name] = Assigned(holding.instead.name, f"{holding.why}: the next better format")
        return given

    def settled(self, inventory: Inventory, request: Request) -> tuple[Inventory, Request]:
        """The inventory with the formats that hold exactly what the checkpoint has, and the request with those of "keep"."""
        inventory = self.described(inventory)
        if mix_name(request.fmt) == KEEP:
            request = replace(request, assigned=self.assigned(inventory))
        return inventory, request

    def described(self, inventory: Inventory) -> Inventory:
        """The inventory with the formats that hold exactly what the checkpoint has."""
        held = self._held(inventory)
        exact = {name: tuple(fmt.name for fmt in holding.formats) for name, holding in held.items()}
        layers = [replace(layer, stored_as=exact.get(layer.holder, ())) for layer in inventory.layers]
        return replace(inventory, layers=layers)

    def keep(self, jobs: Sequence[Job]) -> None:
        """Choose the weights that are taken over as they are: those that get the format which holds them exactly."""
        for job in jobs:
            names = [parameter_name(self.model, name) for name in job.names]
            if any(name in self.holdings and job.fmt in self.holdings[name].formats for name in names):
                self.kept |= dict.fromkeys(names, job)
            elif any(name in self.holdings for name in names):
                job.added.wanted = True

    def explain(self, report: QuantReport, inventory: Inventory) -> None:
        """Add to a report what the checkpoint had."""
        held = self._held(inventory)
        kept = anew = 0
        methods = []
        added: list[float | None] = []
        for row in report.layers:
            holding = held.get(row.tied_to or row.name)
            if holding is None:
                continue
            methods.append(holding.what)
            if row.stored is not None and parameter_name(self.model, row.name) in self.kept:
                told = _KEPT
                kept += row.tied_to is None
            elif row.stored is not None:
                told = f"decoded from {holding.what} and packed anew"
                added.append(row.error)
                anew += row.tied_to is None
            else:
                told = f"decoded from {holding.what}"
            row.reason = "; ".join(filter(None, [told, row.reason]))
        if methods:
            note = f"the checkpoint is quantized already, by {', '.join(dict.fromkeys(methods))}: {kept} weights are taken over as they are"
            if anew:
                most = max((error for error in added if error is not None), default=0.0)
                note += f", {anew} are packed anew, which adds an error of up to {100 * most:.2g} % (column error)"
            report.notes.append(note)

    def _held(self, inventory: Inventory) -> dict[str, Holding]:
        """{first layer that has a weight: how the checkpoint holds it, under any of the names of the weight}."""
        held: dict[str, Holding] = {}
        for layer in inventory.layers:
            holding = self.holdings.get(parameter_name(self.model, layer.name))
            if holding is not None:
                held.setdefault(layer.holder, holding)
        return held

    # ---- the loader --------------------------------------------------------------------------------------------------

    def as_floats(self, tensors: Mapping[str, Any], jobs: Mapping[str, Job]) -> dict[str, Any]:
        """The tensors that the loader reads: entries in place of quantized weights.

        Args:
            tensors: all tensors of the files, by name.
            jobs: the parameters that are packed from floats.
        """
        shown: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name not in self.quantized.hidden}
        for target, group in self.groups.items():
            for _, key in group.collected:
                weight = self.quantized.weights.get(key)
                if weight is None:
                    continue
                if target in self.kept:
                    shown[key] = Blocks(self.quantized, weight, self.kept[target].fmt)
                else:
                    turned = _is_turned(self.model, target, group, weight)
                    one_by_one = target in jobs and group.converter is None
                    shown[key] = Floats(self.quantized, weight, turned, one_by_one)
        return shown


class Blocks:
    """A weight that is taken over as it is, to the loader: a tensor of bytes in a file."""

    def __init__(self, quantized: QuantizedFiles, weight: StoredWeight, fmt: QuantFormat) -> None:
        self._quantized, self._weight, self._fmt = quantized, weight, fmt

    def get_shape(self) -> list[int]:
        *rows, columns = self._weight.shape
        return [*rows, self._fmt.row_bytes(columns)]

    def get_dtype(self) -> str:
        return "U8"

    def __getitem__(self, index: Any) -> Tensor:
        return self._quantized.blocks(self._weight, self._fmt)[index]


class Floats:
    """A weight that is decoded, to the loader: a tensor of floats in a file."""

    def __init__(self, quantized: QuantizedFiles, weight: StoredWeight, turned: bool, one_by_one: bool) -> None:
        self._quantized, self._weight, self._turned = quantized, weight, turned
        self._one_by_one = one_by_one  # a stack is packed matrix by matrix

    def get_shape(self) -> list[int]:
        *rows, height, columns = self._weight.shape
        return [*rows, columns, height] if self._turned else [*rows, height, columns]

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis and self._one_by_one and len(self._weight.shape) == 3:
            return Stack(self._quantized, self._weight, self._turned)
        whole = self._quantized.tensor(self._weight)
        return (whole.transpose(-2, -1) if self._turned else whole)[index]


@dataclass(frozen=True)
class Stack:
    """A stack of experts that the loader has read: its matrices are decoded one by one."""

    quantized: QuantizedFiles
    weight: StoredWeight
    turned: bool  # whether the model has it as [E, K, N], and the matrices are [N, K]
    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Stack:
        """The stack on another device or in another type, as the loader asks for it."""
        where = self.device if device is None else torch.device(device)
        return Stack(self.quantized, self.weight, self.turned, where, dtype or self.dtype)

    def matrix(self, expert: int, upright: bool) -> Tensor:
        """The matrix of one expert, with the output features first; `upright` says whether it is stored so."""
        matrix = self.quantized.matrix(self.weight, expert).to(device=self.device, dtype=self.dtype)
        return matrix if upright else matrix.t()


# ---- how a checkpoint holds a parameter ------------------------------------------------------------------------------


def _holding(
    model: Any, name: str, group: Group, weights: Sequence[StoredWeight | None], quantized: QuantizedFiles
) -> Holding:
    found = tuple(weight for weight in weights if weight is not None)
    if len(found) < len(weights):
        return Holding(found, (), "a part of it is stored in floats")
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return Holding(found, (), "the model has no such parameter")
    if leaf not in matrices(module):
        return Holding(found, (), "it is no matrix that can be packed")
    if group.converter is None and is_turned(module, leaf) and not found[0].oriented:
        return Holding(found, (), "it is stored with the output features last")
    if group.converter is not None and not is_joined(group.converter):
        return Holding(found, (), "transformers rearranges it while it is loaded")
    shared: tuple[QuantFormat, ...] | None = None
    for weight in found:
        formats, why = weight.kept(quantized.files)
        if not formats:
            return Holding(found, (), why)
        shared = formats if shared is None else tuple(fmt for fmt in shared if fmt in formats)
    assert shared is not None, "there is at least one weight"
    return Holding(found, shared, "" if shared else "its parts are stored in different ways")


def _is_turned(model: Any, target: str, group: Group, weight: StoredWeight) -> bool:
    """Whether the model wants a decoded weight with the output features last."""
    path, _, leaf = target.rpartition(".")
    if group.converter is not None or not weight.oriented:
        return False
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return is_turned(module, leaf)


# ---- the seam --------------------------------------------------------------------------------------------------------


def install() -> None:
    """Wrap the two functions of transformers, once in a process."""
    for name, wrapped in (("get_hf_quantizer", _quantizer), ("convert_and_load_state_dict_in_model", _converted)):
        function = getattr(modeling_utils, name)
        if not hasattr(function, "_isqtorch_wrapped"):
            new: Any = wraps(function)(wrapped(function))
            new._isqtorch_wrapped = function
            setattr(modeling_utils, name, new)


def _quantizer(original: Any) -> Any:
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **options: Any) -> Any:
        entry = _taken_entry(config) if isinstance(quantization_config, IsqConfig) else None
        found = original(config, quantization_config, *args, **options)
        if entry is not None:
            found[0].stored = entry
            found[0].key_mapping = _key_mapping(sys._getframe(1))
        elif isinstance(quantization_config, IsqConfig) and mix_name(quantization_config.isq) == KEEP:
            if quantization_config.layers is None:
                raise ValueError(
                    "IsqConfig: 'keep' takes over what a checkpoint has quantized already, and this one has no quantization_config. Give a "
                    "format: IsqConfig(4)."
                )
        return found

    return get_hf_quantizer


def _key_mapping(caller: FrameType) -> Mapping[str, str] | None:
    """The argument `key_mapping` of `from_pretrained`, which transformers gives to no function before the weights are read.

    This breaks if transformers renames its variable; test_stored_bits.py notices.
    """
    found: Mapping[str, str] | None = caller.f_locals.get("key_mapping")
    return found


def _converted(original: Any) -> Any:
    def convert_and_load_state_dict_in_model(
        model: Any, state_dict: Any, load_config: Any, *args: Any, **options: Any
    ) -> Any:
        quantizer = load_config.hf_quantizer
        shown = getattr(quantizer, "as_floats", None)
        return original(model, state_dict if shown is None else shown(state_dict), load_config, *args, **options)

    return convert_and_load_state_dict_in_model


def _taken_entry(config: Any) -> dict[str, Any] | None:
    """The entry of another method, which is removed from a configuration, and checked; None if there is none."""
    found = None
    for part in (config, config.get_text_config(decoder=True)):
        entry = getattr(part, "quantization_config", None)
        if entry is None:
            continue
        if not isinstance(entry, Mapping) and not hasattr(entry, "to_dict"):
            raise ValueError(f"IsqConfig: quantization_config in config.json is {entry!r:.80}, must be an object")
        entry = dict(entry if isinstance(entry, Mapping) else entry.to_dict())
        if entry.get("quant_method") == METHOD:
            return None
        try:
            method_of(entry)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"IsqConfig: {error}") from None
        del part.quantization_config
        found = found or entry
    return found
