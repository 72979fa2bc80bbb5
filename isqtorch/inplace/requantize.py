"""requantize_: change the formats of a quantized model, also while it is serving.

First all new layers are made, one after the other, from the checkpoint that the model was loaded from; the model does
not change. Then they replace the old layers all at once (`exchange.py`). If anything fails, the model is unchanged.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from isqtorch.formats import Spec
from isqtorch.modules import QuantExperts, QuantLinear
from isqtorch.modules.activations import permit
from isqtorch.modules.convert import locate, owner_of, to_packed
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.modules.parameter import PackedParameter, is_plain
from isqtorch.policy.activations import activation_notes
from isqtorch.policy.foreign import check_foreign
from isqtorch.policy.inventory import check_model, inspect_model, packed_names
from isqtorch.policy.options import (
    Activations,
    CalibrationLike,
    Fallback,
    ImatrixLike,
    ModelRule,
    Names,
    Organization,
    Probe,
)
from isqtorch.policy.request import Request
from isqtorch.policy.topology import TopologyLike
from isqtorch.policy.words import explaining
from isqtorch.progress import progress_bar
from isqtorch.report.report import QuantReport

from .checks import check_weights
from .exchange import Swap, check_outside, exchange
from .host import announce
from .origin import Origin, forget
from .pack import Job, naming_memory, pack_weight, relative_error
from .prepare import Prepared, settle
from .vectors import forget_vectors, originals, put_vectors, remember
from .weights import Weights

_OP = "requantize_"


@explaining("requantize_(model, {})")
def requantize_(
    model: nn.Module,
    fmt: Spec | None,
    *,
    source: str | os.PathLike[str] | None = None,
    topology: TopologyLike | None = None,
    organization: Organization | None = None,
    imatrix: ImatrixLike | None = None,
    calibration: CalibrationLike | None = None,
    calibration_file: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    include: Names | None = None,
    exclude: Names | None = None,
    fallback: Fallback | None = None,
    rule: ModelRule | None = None,
    max_memory: int | str | None = None,
    activations: Activations | Literal[""] | None = None,
    target_bpw: float | None = None,
    max_size: int | str | None = None,
    formats: Sequence[Spec] | None = None,
    probe: Probe | None = None,
    progress: bool | None = None,
    measure_error: bool = False,
) -> QuantReport:
    """Change the formats of a quantized model in place, starting from its float weights again.

    The result is the same, bit for bit, as that of `quantize_` on the original model. Weights are read from the
    checkpoint layer by layer. Peak memory is the old and the new packed layers plus the float weight of one layer.
    Layers that the options exclude keep what they have. Layers that are not quantized yet are packed from the weights
    they hold.

    Other threads may run the model meanwhile: each call uses either all old layers or all new ones. The exchange waits
    for calls that have begun, and holds back new calls until it is done. This works for calls of the model or of a part
    of it, not for direct calls of `forward`. A compiled model must not run during the exchange and is compiled again at
    its next call. CUDA graphs must be captured again. A backward that recomputes activations must not be separated from
    its forward by an exchange. The new layers are new objects; they keep the hooks of the old ones.

    Args:
        model: a model with quantized layers; changed in place.
        fmt: see `quantize_`.
        source: where to read the weights: a folder, a .safetensors file, or a .gguf file; or "stored" to decode the
            quantized weights, whose errors then stay. None: the checkpoint that the model was loaded from, which
            `load`, `IsqConfig` and `quantize_` remember. The packed weights of a GGUF file or an MLX folder are taken
            over where they have the format already, and are decoded and packed anew elsewhere.
        topology, organization, include, exclude, fallback: see `quantize_`. None keeps the value of the last request.
            `{}` drops a topology, `""` or `()` drops include or exclude: then all layers are selected.
        imatrix, calibration, calibration_file, tokenizer: see `quantize_`. An importance matrix of an earlier request is not used
            again. Calibration runs the model in its present formats.
        activations: see `quantize_`. None: if any layer may round x now, all layers in fp8 may afterwards, and the
            report notes it. "" withdraws the permission.
        target_bpw, max_size, formats, probe: for "auto", see `quantize_`. The errors of the source's weights are
            measured, weighted by importance if there is any. The probe "kl" is refused, because packed weights have no
            gradients.
        rule, max_memory, progress, measure_error: see `quantize_`. The error is measured against the weights of the source.

    Returns:
        The report: for every weight its old and new format, its size in bytes, and the reason.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: as `quantize_`; or the model has no quantized layer; or the source is not known, lacks a weight, or
            has another shape for it; or the remembered checkpoint differs from the float parameters of the model. The
            model is unchanged.
        OSError: a file cannot be read. The model is unchanged.
        RuntimeError: calls in other threads do not return within 10 minutes, or other code replaced a layer. The model
            is unchanged.
        MemoryError, torch.OutOfMemoryError, RuntimeError: memory ran out while a layer was packed. The model is
            unchanged.

    Example:
        isqtorch.quantize_(model, "q4k")
        report = isqtorch.requantize_(model, "q8_0")
    """
    began = time.perf_counter()
    check_model(model, _OP, fmt)
    before = Origin.of(model)
    origin = before or Origin()
    lasting = origin.options.lasting(
        topology=topology, organization=organization, include=include, exclude=exclude, fallback=fallback
    )
    options = lasting.changed(
        imatrix=imatrix,
        calibration=calibration,
        calibration_file=calibration_file,
        tokenizer=tokenizer,
        rule=rule,
        max_memory=max_memory,
        activations=activations or None,
        target_bpw=target_bpw,
        max_size=max_size,
        formats=formats,
        probe=probe,
        progress=progress,
        measure_error=measure_error,
    )
    request = Request(fmt, options, _OP)
    inventory = inspect_model(model)
    check_foreign(inventory.foreign, request)
    _check(model, probe)
    _check_no_device(request)
    weights = Weights.find(model, source, origin)
    inventory = weights.described(inventory)
    if before is None:
        weights.notes.append(
            "how the model was quantized is not known here; topology, include and exclude are only those of this call"
        )

    def check(prepared: Prepared) -> None:
        _check_parameters(model, prepared)
        if weights.source is None:  # weights of a source are checked when they are read, before anything changes
            check_weights(model, prepared.jobs, prepared.request.op)

    again = weights.source is not None
    prepared, choice = settle(model, inventory, request, check, weights.of, again)
    for message in [*weights.alarms, *prepared.warnings]:
        warnings.warn(message, stacklevel=3)
    swaps, errors = _new_layers(model, prepared, weights)
    for message in prepared.alarms:
        warnings.warn(message, stacklevel=3)
    permission = _permission(model, prepared, swaps, activations)
    vectors = originals(model) if again else {}
    back = [f"{len(vectors)} norms that refine_ tuned have their values from before"] if vectors else []
    report = prepared.report(errors, choice, [*weights.notes, *permission.notes, *back, *weights.alarms])
    _commit(model, swaps, permission, vectors, Origin.made(weights.files, weights.trouble, request), report, began)
    return report


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(model: nn.Module, probe: str | None) -> None:
    """ValueError unless the model can be requantized at all."""
    if probe == "kl":
        raise ValueError(
            "requantize_: probe='kl' needs the gradients of float weights, and these are packed. Leave it out, or use quantize_ on the "
            "float model."
        )
    if not packed_names(model):
        raise ValueError("requantize_: the model holds no quantized layer. Use quantize_.")
    check_outside(model)


def _check_no_device(request: Request) -> None:
    """ValueError if the topology names a device."""
    for entry in request.topology.entries:
        if entry.device is not None:
            raise ValueError(
                f"requantize_: topology entry {entry.key!r} names a device, and requantize_ moves no layer. Leave it out, and "
                "use .to() on the layer."
            )


def _check_parameters(model: nn.Module, prepared: Prepared) -> None:
    """ValueError if a parameter to replace is offloaded or sharded."""
    for job in prepared.jobs:
        module, leaf = owner_of(model, job.names[0])
        parameter = module._parameters[leaf]
        whole = isinstance(parameter, nn.Parameter) and is_plain(parameter)
        if not whole or cast(Tensor, parameter).device.type == "meta":
            kind = "on the meta device" if whole else f"a {type(parameter).__name__}"
            raise ValueError(
                f"requantize_: {job.names[0]} is {kind}: it is offloaded or spread over processes. Exclude it."
            )


# ---- carrying it out -------------------------------------------------------------------------------------------------


def _new_layers(model: nn.Module, prepared: Prepared, weights: Weights) -> tuple[list[Swap], dict[str, float]]:
    """The new layers with their places, and the measured errors."""
    swaps: dict[tuple[int, str], Swap] = {}
    fresh: dict[int, nn.Module] = {}  # id of an old layer -> the new one
    errors: dict[str, float] = {}
    places = {name: _place(model, name) for job in prepared.jobs for name in job.names}
    with progress_bar(_OP, "layer", prepared.request.options.progress, total=len(prepared.jobs)) as bar:
        for job in prepared.turns():
            bar.set_postfix_str(f"{job.names[0]} {job.fmt.name}", refresh=False)
            state = "Nothing was changed. Free memory, or exclude some of the layers."
            with naming_memory(_OP, job.names[0], f"packed in {job.fmt.name}", state):
                parameter, error = _packed(model, job, weights)
            if error is not None:
                errors.update(dict.fromkeys(job.names, error))
            for name in job.names:
                parent, key, old, leaf = places[name]
                new = fresh.get(id(old), old)
                if new is old or isinstance(new, QuantExperts):  # QuantExperts get their stacks one after the other
                    base = old.twin() if new is old and isinstance(old, QuantExperts) else new
                    fresh[id(old)] = new = to_packed(base, parameter, job.fmt, leaf)
                swaps[id(parent), key] = Swap(parent, key, old, new)
            bar.update()
    return list(swaps.values()), errors


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module, str]:
    """(parent module, name of the layer in it, the layer, name of the parameter) of a weight."""
    path, leaf = locate(model, name)
    above, _, key = path.rpartition(".")
    return model.get_submodule(above), key, model.get_submodule(path), leaf


def _packed(model: nn.Module, job: Job, weights: Weights) -> tuple[nn.Parameter, float | None]:
    """The packed weight of a job on the device of the old one, and its error if it is measured."""
    module, leaf = owner_of(model, job.names[0])
    device = cast(Tensor, module._parameters[leaf]).device
    with ordinary_tensors():
        ready = weights.ready(job.names, job.fmt)
        if ready is not None and not job.options.measure_error:
            weights.release()
            return PackedParameter(ready.to(device)), None
        weight = weights.of(job.names)
        try:
            packed = pack_weight(weight, job) if ready is None else ready.to(weight.device)
        except ValueError as fault:
            raise ValueError(f"requantize_: {job.names[0]}: {fault} Nothing was changed.") from None
        error = relative_error(weight, packed, job.fmt) if job.options.measure_error else None
        job.watch.finish()  # reads the weight, whose pages are dropped now
        del weight
        weights.release()
        return PackedParameter(packed.to(device)), error


class _Permission(NamedTuple):
    """The permission `activations` after the exchange."""

    value: str | None  # of all layers in fp8 that the request selects
    kept: dict[QuantLinear, str | None]  # such layers that are not replaced, with the value before
    notes: list[str]  # for the report


def _permission(model: nn.Module, prepared: Prepared, swaps: Sequence[Swap], asked: str | None) -> _Permission:
    """The permission after the exchange; the new layers get it here. `asked` is None if it is to stay as it was."""
    had = any(isinstance(layer, QuantLinear) and layer.activations for layer in model.modules())
    value, notes = asked or None, []
    if had and asked is None:
        value = next(
            layer.activations for layer in model.modules() if isinstance(layer, QuantLinear) and layer.activations
        )
        notes = activation_notes(prepared.inventory.layers, prepared.verdict) or [
            'activations="fp8" is dropped: no linear layer is in fp8 any more'
        ]
    elif had and not asked:
        notes = ['activations="fp8" is dropped: the layers that this request concerns use x as it is']
    permit((swap.new for swap in swaps), value)
    replaced = {id(swap.old) for swap in swaps}
    kept: dict[QuantLinear, str | None] = {}
    for layer, decision in zip(prepared.inventory.layers, prepared.verdict.decisions, strict=True):
        if decision.format is not None and decision.format.activations:
            module, _ = owner_of(model, layer.name)
            if isinstance(module, QuantLinear) and id(module) not in replaced:
                kept[module] = module.activations
    return _Permission(value, kept, notes)


def _commit(
    model: nn.Module,
    swaps: list[Swap],
    permission: _Permission,
    vectors: dict[str, Tensor],
    origin: Origin,
    report: QuantReport,
    began: float,
) -> None:
    """Exchange the layers, give parameters their values from before, and tell the hosts. If one fails, all are undone."""
    before, told = Origin.of(model), getattr(model, "isq_report", None)
    own = dict(model.named_parameters())
    tuned = {name: own[name].detach().clone() for name in vectors}

    def tell() -> None:
        if vectors:
            put_vectors(model, vectors)
            forget_vectors(model)
        report.seconds = time.perf_counter() - began
        origin.attach(model)
        permit(permission.kept, permission.value)
        announce(model, report)

    def take_back() -> None:
        for layer, had in permission.kept.items():
            layer.activations = had
        if vectors:
            put_vectors(model, tuned)
            remember(model, vectors)
        if before is None:
            forget(model)
        else:
            before.attach(model)
        announce(model, told)

    exchange(model, swaps, tell, take_back)
