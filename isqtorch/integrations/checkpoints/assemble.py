"""Build a transformers model from a checkpoint of another program, weight by weight.

The model is made on the meta device. Each weight is then taken over as packed blocks, packed anew from its decoded
values, or set as float values. Never more than one weight is held in float.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.formats import get_format
from isqtorch.inplace.host import announce
from isqtorch.inplace.origin import Origin
from isqtorch.inplace.pack import Job, naming_memory, pack_weight
from isqtorch.inplace.prepare import Prepared
from isqtorch.integrations.transformers.skeleton import (
    Parents,
    describe_unloaded,
    pack_on_meta,
    parents_of,
    prepare_on_cpu,
)
from isqtorch.modules.activations import permit
from isqtorch.modules.convert import owner_of, parameter_name, upright
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.modules.parameter import PackedParameter
from isqtorch.modules.plausible import SWITCH, weight_fault
from isqtorch.ops.native import NATIVE_DEVICES
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.layers import LayerInfo
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request
from isqtorch.policy.topology import Topology
from isqtorch.progress import progress_bar
from isqtorch.report.report import QuantReport
from isqtorch.text import first_names

from .incoming import Checkpoint, Held, Incoming

OP = "load"
_STATE = "Nothing is loaded. Free memory, or load the model onto a device with more of it."


@dataclass(frozen=True)
class _Stored:
    """One weight of the model, in the checkpoint."""

    names: tuple[str, ...]  # of all layers that share it, the first one first
    key: str  # the name of the parameter under which the checkpoint has it
    held: Held


def assemble(
    model: Any,
    checkpoint: Checkpoint,
    request: Request | None,
    device: torch.device,
    progress: bool | None = False,
) -> QuantReport:
    """Fill a model with the weights of a checkpoint.

    Args:
        model: a transformers model with parameters on the meta device, in the float type in which it will compute, and
            real buffers.
        checkpoint: where the weights come from.
        request: formats for packing anew. Weights that already have the format that it gives them, and weights that it
            leaves alone, stay as they are in the checkpoint. None: all do.
        device: where the weights go.
        progress: whether to show a progress bar; None: if stderr is a terminal.

    Returns:
        The report. It is `model.isq_report` as well, if any weight is packed.

    Raises:
        ValueError: the checkpoint lacks a weight, has it in another shape, or is damaged; as `quantize_` for the request.
        OSError: a file cannot be read.
    """
    began = time.perf_counter()
    incoming = checkpoint.weights(model)
    inventory, stored = _as_stored(describe_unloaded(model, {"": str(device)}), model, incoming)
    prepared = _prepare(inventory, stored, request)
    jobs = {} if prepared is None else {name: job for job in prepared.jobs for name in job.names}
    for job in [] if prepared is None else prepared.jobs:
        job.added.wanted = job.names[0] in stored and not stored[job.names[0]].held.is_float()
    for message in [] if prepared is None else prepared.warnings:
        warnings.warn(message, stacklevel=3)
    parents = parents_of(model)
    with ordinary_tensors(), progress_bar(OP, "layer", progress, inventory.layers) as bar:
        for layer in bar:
            if layer.tied_to is None and layer.name in jobs and layer.name in stored:
                _pack(model, parents, incoming, stored[layer.name], jobs[layer.name], device)
            elif layer.tied_to is None and layer.packed_as is not None:
                _keep(model, parents, incoming, stored[layer.name], layer.packed_as, device)
        _fill(model, incoming, device)
    incoming.release()
    if request is not None:
        permit(model.modules(), request.options.activations)
    report = QuantReport.of_packed(inventory) if prepared is None else prepared.report()
    _explain(report, stored, incoming, model)
    anew = [name for name in jobs if name in stored and not stored[name].held.is_float()] if request is not None else []
    if anew:
        report.notes.append(
            f"{len(anew)} weights are packed anew from the quantized ones of {incoming.where}: their errors stay, and more bits "
            "gain nothing"
        )
    origin = Origin(checkpoint.files) if request is None else Origin.made(checkpoint.files, None, request)
    origin.attach(model)
    announce(model, report)
    for message in [] if prepared is None else prepared.alarms:
        warnings.warn(message, stacklevel=3)
    report.seconds = time.perf_counter() - began
    return report


def stored_inventory(model: Any, checkpoint: Checkpoint) -> Inventory:
    """The inventory that a model without weights would have with all blocks of a checkpoint. No weight is read."""
    incoming = checkpoint.weights(model)
    inventory, _ = _as_stored(describe_unloaded(model, {"": "cpu"}), model, incoming)
    incoming.release()
    return inventory


# ---- what becomes of each weight ------------------------------------------------------------------------------------


def _as_stored(inventory: Inventory, model: Any, incoming: Incoming) -> tuple[Inventory, dict[str, _Stored]]:
    """The inventory of the model as if it had taken over all blocks, and {first layer: what the checkpoint has}."""
    sharing: dict[str, list[str]] = {}
    for layer in inventory.layers:
        sharing.setdefault(layer.holder, []).append(layer.name)
    stored: dict[str, _Stored] = {}
    layers = []
    for layer in inventory.layers:
        if layer.tied_to is None:
            names = sharing[layer.name]
            found = ((key, incoming.held(key)) for key in (parameter_name(model, name) for name in names))
            key, held = next(((key, held) for key, held in found if held is not None), ("", None))
            if held is not None:
                stored[layer.name] = _Stored(tuple(names), key, held)
        held = stored[layer.holder].held if layer.holder in stored else None
        takes = held is not None and held.fmt is not None and layer.kind != "other" and layer.keep is None
        if takes and held is not None and held.fmt is not None:
            layer = replace(layer, packed_as=held.fmt.name, stored_as=(held.fmt.name,))
        layers.append(layer)
    return replace(inventory, layers=_experts_together(layers, stored)), stored


def _experts_together(layers: Sequence[LayerInfo], stored: dict[str, _Stored]) -> list[LayerInfo]:
    """Make all stacks of fused experts float if one of them is: a module of experts computes only when all are packed."""
    floats = {
        layer.block: layer.name
        for layer in layers
        if layer.kind == "experts"
        and layer.packed_as is None
        and (layer.name not in stored or stored[layer.name].held.instead is None)
    }
    together = []
    for layer in layers:
        other = floats.get(layer.block) if layer.kind == "experts" else None
        if other is None or layer.name not in stored or stored[layer.name].held.is_float():
            together.append(layer)
            continue
        held = Held(note=f"decoded, because {other} of the same experts is float in the file")
        stored[layer.name] = replace(stored[layer.name], held=held)
        together.append(replace(layer, packed_as=None, stored_as=()))
    return together


def _prepare(inventory: Inventory, stored: dict[str, _Stored], request: Request | None) -> Prepared | None:
    """The weights to pack anew; None if there are none."""
    if request is not None:
        return prepare_on_cpu(inventory, request)
    anew = {
        layer.name: stored[layer.holder].held.instead
        for layer in inventory.layers
        if layer.holder in stored and layer.kind != "other" and layer.keep is None
    }
    formats = {name: fmt.name for name, fmt in anew.items() if fmt is not None}
    if not formats:
        return None
    return prepare_on_cpu(inventory, Request(None, Options(topology=Topology.exact(formats)), OP))


# ---- weight by weight -----------------------------------------------------------------------------------------------


def _keep(model: Any, parents: Parents, incoming: Incoming, stored: _Stored, format: str, device: torch.device) -> None:
    """Take over the blocks of one weight."""
    fmt = get_format(format)
    for name in stored.names:
        pack_on_meta(model, name, fmt, parents)
    module, leaf = owner_of(model, stored.names[0])
    shape = tuple(module._parameters[leaf].shape)  # type: ignore[union-attr]
    blocks = incoming.blocks(stored.key)
    if tuple(blocks.shape) != shape:
        raise _misfit(incoming, stored.key, f"{fmt.name} blocks {list(blocks.shape)}", shape)
    why = weight_fault(blocks, fmt)
    if why is not None:
        raise ValueError(
            f"{OP}: {incoming.where}: {stored.key}: its bytes are not {fmt.name}: {why}. The file is damaged. {SWITCH}=0 in the "
            "environment skips this check."
        )
    _share(model, stored.names, PackedParameter(blocks.to(device)))


def _pack(model: Any, parents: Parents, incoming: Incoming, stored: _Stored, job: Job, device: torch.device) -> None:
    """Pack one weight from its decoded values, which are rounded to the model's type as for `requantize_`."""
    module, leaf = owner_of(model, stored.names[0])
    expected = module._parameters[leaf]
    assert expected is not None
    weight = _read(incoming, stored.key, tuple(expected.shape)).to(expected.dtype)
    matrix = upright(module, weight)
    if device.type in NATIVE_DEVICES:  # on other devices, packing on the CPU and copying is faster
        matrix = matrix.to(device)
    with naming_memory(OP, job.names[0], f"packed in {job.fmt.name}", _STATE):
        try:
            packed = pack_weight(matrix, job)
        except ValueError as error:
            raise ValueError(f"{OP}: {incoming.where}: {stored.names[0]}: {error}") from None
        job.watch.finish()  # reads the weight, which is freed now
    del weight, matrix
    incoming.release()
    for name in stored.names:
        pack_on_meta(model, name, job.fmt, parents)
    _share(model, stored.names, PackedParameter(packed.to(device)))


def _share(model: Any, names: Sequence[str], parameter: PackedParameter) -> None:
    """Set the packed weight in all layers that share it."""
    for name in names:
        module, leaf = owner_of(model, name)
        module._parameters[leaf] = parameter
        parameter.belongs_to(module, leaf)


def _fill(model: Any, incoming: Incoming, device: torch.device) -> None:
    """Set the parameters and saved buffers that are not packed, and move what no checkpoint has."""
    ties: dict[str, str] = dict(model.all_tied_weights_keys)
    state = set(model.state_dict(keep_vars=True))
    values: dict[object, Tensor] = {}  # by the tensor on the meta device, or by the name of the parameter it is tied to
    missing = []
    for path, module in list(model.named_modules()):
        for store in (module._parameters, module._buffers):
            for leaf, old in store.items():
                name = f"{path}.{leaf}".lstrip(".")
                if old is None or isinstance(old, PackedParameter):
                    continue
                if name not in state or (store is module._buffers and incoming.held(name) is None):
                    store[leaf] = old.to(device)  # a buffer that the model computes
                    continue
                first = ties.get(name, name)
                key = id(old) if first == name and first not in values else first
                if key not in values:
                    source = next((each for each in (name, first) if incoming.held(each) is not None), None)
                    if source is None:
                        missing.append(name)
                        continue
                    value = _read(incoming, source, tuple(old.shape)).to(device, old.dtype)
                    is_parameter = store is module._parameters
                    values[key] = values[first] = nn.Parameter(value, old.requires_grad) if is_parameter else value
                store[leaf] = values[key]
    if missing:
        raise ValueError(
            f"{OP}: {incoming.where} has no {first_names(missing)}, which {type(model).__name__} needs. It is of another "
            "architecture, or only a part of a model."
        )


def _read(incoming: Incoming, key: str, shape: tuple[int, ...]) -> Tensor:
    """The float values of a parameter."""
    weight = incoming.read(key)
    assert weight is not None, "the checkpoint said that it has the parameter"
    if tuple(weight.shape) != shape:
        raise _misfit(incoming, key, str(list(weight.shape)), shape)
    return weight


def _misfit(incoming: Incoming, key: str, found: str, wanted: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{OP}: {incoming.where}: {key} is {found}, and the configuration makes it {list(wanted)}. The file is damaged, or its "
        "configuration is of another model."
    )


def _explain(report: QuantReport, stored: dict[str, _Stored], incoming: Incoming, model: Any) -> None:
    """Add what the checkpoint had to the reasons of the layers, and a note about what was left out."""
    for layer in report.layers:
        held = stored[layer.tied_to or layer.name].held if (layer.tied_to or layer.name) in stored else None
        if held is not None and held.note:
            layer.reason = "; ".join(filter(None, [held.note, layer.reason]))
    report.notes.extend(incoming.notes)
    unused = incoming.unused(model.state_dict(keep_vars=True))
    if unused:
        report.notes.append(
            f"{len(unused)} tensors of {incoming.where} have no place in the model: {first_names(unused)}"
        )
