"""requantize_: give a quantized model other formats while it goes on serving.

All new layers are made first, one after the other, from the checkpoint that the model came from; nothing of the model changes
meanwhile. Then they take the places of the old ones at once (`exchange.py`), and whatever fails leaves the model as it was.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from isqtorch.auto import Budget, choose_formats, smallest_choice
from isqtorch.formats import Spec
from isqtorch.importance.calibration import Calibrate, collect
from isqtorch.importance.imatrix import ImatrixLike
from isqtorch.modules import PackedModule, QuantExperts, QuantLinear
from isqtorch.modules.activations import permit
from isqtorch.modules.convert import float_shape, is_turned, locate, to_packed, weight_matrix
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.ops.native import NATIVE_DEVICES
from isqtorch.policy.activations import activation_notes
from isqtorch.policy.decide import Request
from isqtorch.policy.inventory import check_model, inspect_model, packed_names
from isqtorch.policy.topology import TopologyLike
from isqtorch.progress import progress_bar
from isqtorch.report.report import QuantReport

from .exchange import Swap, check_outside, exchange
from .listeners import announce
from .origin import Origin, forget
from .pack import pack_weight
from .prepare import Job, Prepared, prepare, prepare_inventory
from .source import Source, difference, files_in, open_source

STORED = "stored"
_WAYS_OUT = (
    "Give source=..., the folder or .safetensors file with the model's float weights, or source='stored' to start from the "
    "quantized weights, whose errors then stay"
)


def requantize_(
    model: nn.Module,
    fmt: Spec | None,
    *,
    source: str | os.PathLike[str] | None = None,
    topology: TopologyLike | None = None,
    organization: str | None = None,
    imatrix: ImatrixLike | None = None,
    calibration_file: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    fallback: str | None = None,
    rule: str | None = None,
    activations: str | None = None,
    target_bpw: float | None = None,
    max_size: int | str | None = None,
    formats: Sequence[Spec] | None = None,
    probe: str | None = None,
    progress: bool | None = None,
    measure_error: bool = False,
) -> QuantReport:
    """Change the formats of a quantized model in place, starting from its float weights again.

    The result is that of `quantize_` on the original model, bit for bit. Weights are read from the checkpoint layer by layer;
    memory peaks at the old and the new packed layers together plus one layer's float weight. Layers that the options leave out
    keep what they have; those that are not quantized yet are made from the weights they hold.

    Other threads may run the model meanwhile: each call computes with all of the old layers or all of the new. The exchange waits
    for the calls that have begun, and holds back new ones for as long. Calls mean calling the model or a part of it, not its
    `forward`. A model that is compiled is compiled anew at its next call and must not run during the exchange; CUDA graphs must be
    captured again; a backward that recomputes activations belongs on the same side as its forward. Layers are new objects
    afterwards; hooks on them are kept.

    Args:
        model: a model with quantized layers.
        fmt: see `quantize_`.
        source: where the float weights are: a folder or a .safetensors file, or "stored" for the quantized weights
            themselves, whose errors stay. None: the checkpoint that the model was loaded from, which `IsqConfig` and
            `quantize_` remember.
        topology, organization, include, exclude, fallback: see `quantize_`. What is None stays as it was asked for last; `{}`,
            `""` and `()` drop a topology, include and exclude.
        imatrix, calibration_file, tokenizer: see `quantize_`. Nothing of an earlier importance matrix is kept; calibration runs
            the model as it is now.
        activations: see `quantize_`. None: if any layer may round x, all that are fp8 afterwards may; with a note, also if there is
            none. "" drops it.
        target_bpw, max_size, formats, probe: for "auto", see `quantize_`. The errors are those of the source's weights, weighed by
            importance if there is any; the probe "kl" is refused, because packed weights have no gradients.
        rule, progress, measure_error: see `quantize_`; the error is that against the source.

    Returns:
        The report: every weight, what it was, what it is, and why.

    Raises:
        ValueError: as `quantize_`; the model holds no quantized layer; the source is not known, lacks a layer or has another
            shape for it, or was changed, as far as the model's float parameters show. The model is as it was.
        OSError: a file that cannot be read. The model is as it was.
        RuntimeError: calls in other threads do not come to an end. The model is as it was.
    """
    began = time.perf_counter()
    check_model(model, "requantize_")
    budget = Budget.parse("requantize_", fmt, target_bpw, max_size, formats, probe)
    if probe == "kl":
        raise ValueError(
            "requantize_: probe='kl' needs the gradients of float weights, and these are packed. Leave it out, or use quantize_ on the "
            "float model."
        )
    if not packed_names(model):
        raise ValueError("requantize_: the model holds no quantized layer. Use quantize_.")
    check_outside(model)
    before = Origin.of(model)
    origin = before or Origin()
    had = any(isinstance(layer, QuantLinear) and layer.activations for layer in model.modules())
    request = origin.request(fmt, topology, organization, include, exclude, fallback, activations or None)
    files, weights, notes, alarm = _weights(model, source, origin)
    choice, asked = None, request.activations
    if budget is not None:
        request = smallest_choice(model, request, budget, None)
    if before is None:
        notes.append(
            "how the model was quantized is not known here; topology, include and exclude are only those of this call"
        )
    if calibration_file is not None:
        calibrate = Calibrate(calibration_file, tokenizer)
        imatrix = collect(
            model, "requantize_", imatrix, calibrate, progress, lambda: _prepare(model, request, None, rule, weights)
        )
    if budget is not None:
        _prepare(model, request, imatrix, rule, weights)  # what is wrong shows before everything is measured
        text = Calibrate(None, None)
        request, choice = choose_formats(model, request, budget, imatrix, text, None, rule, progress, weights.of)
        request = replace(request, activations=asked)
    prepared = _prepare(model, request, imatrix, rule, weights)
    for message in [*alarm, *prepared.warnings]:
        warnings.warn(message, stacklevel=2)
    swaps, errors = _packed(model, prepared, weights, progress, measure_error)
    inherits = had and activations is None
    if inherits:
        kept_notes = activation_notes(prepared.inventory.layers, prepared.verdict)
        notes += kept_notes or ['activations="fp8" is dropped: no linear layer is in fp8 any more']
    elif had and request.activations is None:
        notes.append('activations="fp8" is dropped: the layers that this request concerns use x as it is')
    allowed = "fp8" if inherits else request.activations
    permit((swap.new for swap in swaps), allowed)
    kept = _kept(model, prepared, swaps)

    report = QuantReport.build(prepared.inventory, prepared.verdict, request.fmt)
    made = {name for job in prepared.jobs for name in job.names}
    for layer in report.layers:
        layer.error = errors.get(layer.name)
        if layer.name in made:
            layer.reason = layer.reason.replace(f"is {layer.stored} already", "made anew")
    report.notes += [*prepared.notes, *notes, *alarm]
    report.imatrix, report.rule = prepared.imatrix, prepared.rule
    if choice is not None:
        report.record(choice)
    trouble = origin.trouble if source == STORED else None
    _commit(model, swaps, kept, allowed, Origin.made(files, trouble, request), report, began)
    return report


# ---- where weights come from -----------------------------------------------------------------------------------------


class Weights:
    """The float weight of each layer to be packed: of an ordinary layer its own, of a packed one that of the source."""

    def __init__(self, model: nn.Module, source: Source | None) -> None:
        self.model, self.source = model, source

    def of(self, names: Sequence[str]) -> Tensor:
        """`[N, K]` or `[E, N, K]`, where it can be packed; not to be written to.

        Args:
            names: of all layers that share the weight.

        Raises:
            ValueError: the source has no such weight, or not in this shape.
            OSError: it cannot be read.
        """
        path, leaf = locate(self.model, names[0])
        module = self.model.get_submodule(path)
        own = cast(Tensor, module._parameters[leaf])
        if not isinstance(module, PackedModule) or leaf not in module.packed:
            return weight_matrix(module, leaf).detach()
        self.release()  # what was read before
        if self.source is None:
            decoded: Tensor = torch.ops.isqtorch.dequantize(own, module.packed[leaf], torch.float32)
            return decoded
        weight = self._read(names, module, leaf).to(module.dtype)
        if own.device.type in NATIVE_DEVICES:  # elsewhere packing is slower than both copies
            weight = weight.to(own.device)
        return weight.transpose(-2, -1) if is_turned(module) else weight

    def _read(self, layers: Sequence[str], module: PackedModule, leaf: str) -> Tensor:
        assert self.source is not None, "checked by the caller"
        names = [".".join(locate(self.model, layer)) for layer in layers]  # it is stored under any one of them
        shape = float_shape(module, leaf)
        for name in names:
            weight = self.source.read(name)
            if weight is None:
                continue
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"requantize_: {name} is {list(weight.shape)} in {self.source.where}, {list(shape)} in the model. {_WAYS_OUT}, or "
                    "exclude the layer."
                )
            return weight
        raise ValueError(f"requantize_: {self.source.where} has no {names[0]}. {_WAYS_OUT}, or exclude the layer.")

    def release(self) -> None:
        if self.source is not None:
            self.source.release()


def _weights(
    model: nn.Module, source: str | os.PathLike[str] | None, origin: Origin
) -> tuple[tuple[str, ...], Weights, list[str], list[str]]:
    """(the files to remember, where to read weights, notes for the report, what the user should be warned of)"""
    if source == STORED:
        note = "made from the quantized weights: their errors stay, and more bits gain nothing"
        return origin.files, Weights(model, None), [note], []
    if source is None:
        if not origin.files:
            raise ValueError(f"requantize_: it is not known where the model's weights came from. {_WAYS_OUT}.")
        if origin.trouble is not None:
            raise ValueError(
                f"requantize_: {_folder(origin.files)} cannot stand for the model's weights: {origin.trouble}. {_WAYS_OUT}."
            )
    files = origin.files if source is None else files_in(source)
    opened = open_source(model, files, files == origin.files)
    changed = difference(model, opened)
    alarm = []
    if changed is not None:
        finding = (
            f"{changed} is not what {opened.where} has: the model was changed since, or it is another one's checkpoint"
        )
        if source is None:
            raise ValueError(f"requantize_: {finding}. {_WAYS_OUT}.")
        alarm.append(f"requantize_: {finding}; the parameters that are not quantized stay as they are")
    return files, Weights(model, opened), [f"made from the weights in {opened.where}"], alarm


def _folder(files: Sequence[str]) -> str:
    return os.path.dirname(files[0])


# ---- carrying it out -------------------------------------------------------------------------------------------------


def _prepare(
    model: nn.Module, request: Request, imatrix: ImatrixLike | None, rule: str | None, weights: Weights
) -> Prepared:
    """Decide about every weight. Those of a source are checked when they are read: until the end nothing is changed."""
    if weights.source is None:
        prepared = prepare(model, request, imatrix, None, rule)
    else:
        prepared = prepare_inventory(inspect_model(model), request, imatrix, None, rule, again=True)
    for job in prepared.jobs:
        path, leaf = locate(model, job.names[0])
        parameter = model.get_submodule(path)._parameters[leaf]
        if type(parameter) is not nn.Parameter or parameter.device.type == "meta":
            kind = "on the meta device" if type(parameter) is nn.Parameter else f"a {type(parameter).__name__}"
            raise ValueError(
                f"requantize_: {job.names[0]} is {kind}: it is offloaded or spread over processes. Exclude it."
            )
    return prepared


def _packed(
    model: nn.Module, prepared: Prepared, weights: Weights, progress: bool | None, measure: bool
) -> tuple[list[Swap], dict[str, float]]:
    """The new layers and where they belong, and the errors that were measured."""
    swaps: dict[tuple[int, str], Swap] = {}
    fresh: dict[int, nn.Module] = {}  # id of an old layer -> the new one
    errors: dict[str, float] = {}
    places = {name: _place(model, name) for job in prepared.jobs for name in job.names}
    with progress_bar("requantize_", "layer", progress, total=len(prepared.jobs)) as bar:
        for job in prepared.jobs:
            bar.set_postfix_str(f"{job.names[0]} {job.fmt.name}", refresh=False)
            parameter, error = _pack(model, job, weights, measure)
            if error is not None:
                errors.update(dict.fromkeys(job.names, error))
            for name in job.names:
                parent, key, old, leaf = places[name]
                new = fresh.get(id(old), old)
                if new is old or isinstance(new, QuantExperts):  # experts get one stack after the other
                    base = old.twin() if new is old and isinstance(old, QuantExperts) else new
                    fresh[id(old)] = new = to_packed(base, parameter, job.fmt, leaf)
                swaps[id(parent), key] = Swap(parent, key, old, new)
            bar.update()
    return list(swaps.values()), errors


def _kept(model: nn.Module, prepared: Prepared, swaps: Sequence[Swap]) -> dict[QuantLinear, str | None]:
    """Linear layers that the request concerns and that are in fp8 already: {layer: its activations}."""
    replaced = {id(swap.old) for swap in swaps}
    found: dict[QuantLinear, str | None] = {}
    for layer, decision in zip(prepared.inventory.layers, prepared.verdict.decisions, strict=True):
        if decision.format is not None and decision.format.name == "fp8":
            module = model.get_submodule(locate(model, layer.name)[0])
            if isinstance(module, QuantLinear) and id(module) not in replaced:
                found[module] = module.activations
    return found


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module, str]:
    """(parent, name in it, module, name of the parameter) of a weight."""
    path, leaf = locate(model, name)
    above, _, key = path.rpartition(".")
    return model.get_submodule(above), key, model.get_submodule(path), leaf


def _pack(model: nn.Module, job: Job, weights: Weights, measure: bool) -> tuple[nn.Parameter, float | None]:
    path, leaf = locate(model, job.names[0])
    device = cast(Tensor, model.get_submodule(path)._parameters[leaf]).device
    with ordinary_tensors():
        weight = weights.of(job.names)
        try:
            packed, error = pack_weight(weight, job, measure)
        except ValueError as fault:
            raise ValueError(f"requantize_: {job.names[0]}: {fault} Nothing was changed.") from None
        del weight
        weights.release()
        return nn.Parameter(packed.to(device), requires_grad=False), error


def _commit(
    model: nn.Module,
    swaps: list[Swap],
    kept: dict[QuantLinear, str | None],
    activations: str | None,
    origin: Origin,
    report: QuantReport,
    began: float,
) -> None:
    """Exchange the layers and tell everybody, or neither."""
    before, told = Origin.of(model), getattr(model, "isq_report", None)

    def tell() -> None:
        report.seconds = time.perf_counter() - began
        origin.attach(model)
        permit(kept, activations)
        announce(model, report)

    def take_back() -> None:
        for layer, had in kept.items():
            layer.activations = had
        if before is None:
            forget(model)
        else:
            before.attach(model)
        announce(model, told)

    exchange(model, swaps, tell, take_back)
