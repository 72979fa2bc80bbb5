"""quantize_: replace the layers of a live model in place, one by one.

There are two phases. First everything that can fail is checked (`prepare.py`), and the model does not change. Then each
layer is packed and replaced. Its float weight is freed before the next layer is packed, so peak memory is the model
plus the scratch memory of its largest layer.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from isqtorch.formats import Spec
from isqtorch.modules.activations import permit
from isqtorch.modules.convert import locate, owner_of, put_module, to_packed, weight_matrix
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.modules.parameter import PackedParameter
from isqtorch.policy.foreign import check_foreign
from isqtorch.policy.inventory import check_model, inspect_model, packed_names
from isqtorch.policy.options import (
    Activations,
    CalibrationLike,
    Fallback,
    ImatrixLike,
    ModelRule,
    Names,
    Options,
    Organization,
    Probe,
)
from isqtorch.policy.request import Request
from isqtorch.policy.topology import TopologyLike
from isqtorch.policy.words import explaining
from isqtorch.progress import progress_bar
from isqtorch.report.report import QuantReport

from .checks import check_devices, check_weights
from .host import announce
from .origin import Origin
from .pack import Job, naming_memory, pack_weight, relative_error
from .prepare import Prepared, settle
from .taken import Taken


@explaining("quantize_(model, {})")
def quantize_(
    model: nn.Module,
    fmt: Spec | None,
    *,
    topology: TopologyLike | None = None,
    organization: Organization = "default",
    imatrix: ImatrixLike | None = None,
    calibration: CalibrationLike | None = None,
    calibration_file: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    include: Names | None = None,
    exclude: Names | None = None,
    fallback: Fallback = "up",
    device: torch.device | str | None = None,
    rule: ModelRule | None = None,
    max_memory: int | str | None = None,
    activations: Activations | None = None,
    target_bpw: float | None = None,
    max_size: int | str | None = None,
    formats: Sequence[Spec] | None = None,
    probe: Probe | None = None,
    progress: bool | None = None,
    measure_error: bool = False,
) -> QuantReport:
    """Quantize the linear layers, embeddings and experts of a model in place.

    Any nn.Module works. Linear layers and embeddings are found by exact type (nn.Linear, nn.Embedding, Conv1D of
    transformers), fused experts by their parameters. All other layers stay as they are: norms, biases, routers,
    convolutions, position embeddings, layers whose weight other code reads directly, and so on. The report gives the
    reason for each. The model remembers the request and, if transformers loaded it, the checkpoint, so that
    `requantize_` can start from there.

    The weight of a layer has the shape [N, K], with K input features (columns). A format packs blocks of consecutive
    columns.

    Args:
        model: the model; must not itself be a layer to quantize. It is changed in place.
        fmt: a format name ("q4k", "afq4", "hqq8", "fp8", ...), or a number of bits (2, 3, 4, 5, 6 or 8) for the best
            format of that size on the device, or a rule for whole models. "q4k_m" and similar names are llama.cpp's
            mixes (docs/guide.md lists them). "auto" measures every layer in several formats and chooses the best ones
            within `target_bpw` or `max_size`. None quantizes only the layers that the topology names.
        topology: formats for some of the layers: a dict, the path of a YAML file, or an `isqtorch.Topology`, where the
            syntax is explained. Layers that get a format there are not promoted.
        organization: "default", or "moqe" to quantize only the routed experts.
        imatrix: the importance of each input column of a layer: a dict {layer: f32 [K]}, an `isqtorch.Imatrix`, or the
            path of an importance matrix file.
        calibration: a text to collect an importance matrix from before quantizing (see `collect_imatrix`), instead of
            `imatrix`. "self" lets the model write the text: 48 sequences of 256 tokens. Else it is the path of a text
            file, token ids `[T]`, or windows of token ids `[S, T]`. "auto" takes both and then uses the text only for
            its measurements. The model must be a causal language model that can run on its device; to write a text, one
            of transformers.
        calibration_file: another spelling of `calibration`.
        tokenizer: the tokenizer of the model, for a text file. With "self" it tells whether texts begin with BOS.
        include: regexes, searched in the module path; only layers that match one of them are quantized. An empty list
            selects none.
        exclude: regexes, searched in the module path; layers that match one of them are left as they are.
        fallback: what to do if K is not a multiple of the format's block size: "up" takes the next larger format that
            fits, "skip" leaves the layer as it is, "error" raises before anything is changed.
        device: where to move the model; each layer is moved just before it is packed. None: nothing is moved.
        rule: an alternative quantization rule. "search" (afq and hqq) is slower, has a smaller error, and is the only
            rule of these formats that uses importance. "mlx" (afq) gives the same bits as MLX. Layers in other formats
            use their default rule, and the report names them. "feedback" (all formats) rounds the weights of a row one
            after the other, each knowing what the ones before it did wrong: the same bytes per weight, about half the
            divergence. It needs second moments of the inputs: `imatrix` is then an `isqtorch.Moments` or its file, or
            they are collected from `calibration_file`. Each layer is also packed by importance alone, and what gives
            better outputs on held-out text is kept.
        max_memory: for "feedback" with a calibration file: largest size of the moments in memory, in bytes or as "6GB".
            The model runs over the text as often as this needs. None: half of the memory that is free.
        activations: "fp8" allows linear layers in fp8 to round their input x to FP8 too where that is faster, as
            torch's allow_tf32 allows TF32. It acts on GPUs of compute capability 9.0, for many rows of x. No effect on
            experts and embeddings. None: x is not rounded.
        target_bpw: for "auto": largest average in bits per weight, over the whole model with all that is not quantized.
        max_size: for "auto", instead of `target_bpw`: largest size of the model in bytes, or a string like "6GB" or
            "5.5GiB".
        formats: for "auto": the formats to choose from; None: for each number of bits the best format on the device.
        probe: for "auto": what to measure. "kl" takes the curvature of the KL divergence on the calibration file, with
            a few backward passes. "output" takes the errors of the layers' outputs, weighted by importance, or the
            errors of the weights if there is no importance. None: "kl" if there is a calibration file, else "output".
        progress: whether to show a progress bar; None: if stderr is a terminal.
        measure_error: whether to report the RMS error of every weight relative to its RMS. It decodes each weight once.

    Returns:
        The report: for every weight its old and new format, its size in bytes, and the reason.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the request, the importance or a weight is not valid (NaN, infinity, meta device), or the model is
            already quantized, by isqtorch or another quantizer. The model is unchanged.
        OSError: a topology, imatrix or calibration file cannot be read.
        MemoryError, torch.OutOfMemoryError, RuntimeError: memory ran out while a layer was packed. The layers before it
            are packed, and the others unchanged.

    Example:
        report = isqtorch.quantize_(model, 4, exclude="lm_head")
        print(report)
    """
    began = time.perf_counter()
    options = Options(
        topology=topology,
        organization=organization,
        include=include,
        exclude=exclude,
        fallback=fallback,
        device=device,
        imatrix=imatrix,
        calibration=calibration,
        calibration_file=calibration_file,
        tokenizer=tokenizer,
        rule=rule,
        max_memory=max_memory,
        activations=activations,
        target_bpw=target_bpw,
        max_size=max_size,
        formats=formats,
        probe=probe,
        progress=progress,
        measure_error=measure_error,
    )
    check_model(model, "quantize_", fmt)
    request = Request(fmt, options, "quantize_")
    packed = packed_names(model)
    if packed:
        raise ValueError(
            f"quantize_: {packed[0]} is quantized already ({len(packed)} layers are). Use requantize_ to change formats, or "
            "dequantize_ first."
        )
    inventory = inspect_model(model).on(request.device)
    check_foreign(inventory.foreign, request)
    check_devices(request)
    taken = Taken.of(model, request)
    inventory = inventory if taken is None else taken.described(inventory)
    prepared, choice = settle(
        model, inventory, request, lambda prepared: check_weights(model, prepared.jobs, prepared.request.op)
    )
    origin = Origin.before(model, request)
    for message in prepared.warnings:
        warnings.warn(message, stacklevel=3)
    errors = _replace_layers(model, prepared, taken)
    report = prepared.report(errors, choice)
    report.seconds = time.perf_counter() - began
    origin.attach(model)
    announce(model, report)
    for message in prepared.alarms:
        warnings.warn(message, stacklevel=3)
    return report


# ---- carrying it out -------------------------------------------------------------------------------------------------


def _replace_layers(model: nn.Module, prepared: Prepared, taken: Taken | None) -> dict[str, float]:
    """Pack layer by layer, and move the rest of the model to its device. Returns the errors, if they are measured.

    If moments are collected in several passes, the model must run as it was until the last one. All packed layers are
    put in place at the end then.
    """
    request = prepared.request
    errors: dict[str, float] = {}
    placed: set[int] = set()
    waiting: list[tuple[Job, nn.Parameter]] = []
    runs_again = prepared.supply is not None and prepared.supply.count > 1
    with progress_bar(request.op, "layer", request.options.progress, total=len(prepared.jobs)) as bar:
        for number, job in enumerate(prepared.turns()):
            bar.set_postfix_str(f"{job.names[0]} {job.fmt.name}", refresh=False)
            done = 0 if runs_again else number
            state = (
                f"{done} of {len(prepared.jobs)} weights are packed, the others are as they were, and the model runs. To pack all, "
                "free memory and load the model again; IsqConfig packs while it loads and needs less memory."
            )
            with naming_memory(request.op, job.names[0], f"packed in {job.fmt.name}", state):
                try:
                    parameter, error = _packed(model, job, taken)
                except ValueError as fault:  # only moments that cannot be factorized: all else was checked before
                    raise ValueError(f"{request.op}: {job.names[0]}: {fault} {state}") from None
                if runs_again:
                    waiting.append((job, parameter))
                else:
                    _put(model, job, parameter, placed)
            if error is not None:
                errors.update(dict.fromkeys(job.names, error))
            bar.update()
    for job, parameter in waiting:
        _put(model, job, parameter, placed)
    permit(model.modules(), request.options.activations)
    if request.device is not None:
        _move_rest(model, request.device, placed)
    return errors


def _put(model: nn.Module, job: Job, parameter: nn.Parameter, placed: set[int]) -> None:
    """Put the packed layers of one weight in place. The float weight is freed when this returns."""
    done: dict[int, nn.Module] = {}
    for name in job.names:
        path, leaf = locate(model, name)
        old = model.get_submodule(path)
        if old._parameters[leaf] is parameter:
            continue  # a module with several names: replaced already
        if id(old) not in done:
            new = to_packed(old, parameter, job.fmt, leaf)
            done[id(old)] = new if job.device is None else new.to(job.device)
            placed.add(id(new))
        put_module(model, path, done[id(old)])


def _packed(model: nn.Module, job: Job, taken: Taken | None) -> tuple[nn.Parameter, float | None]:
    """The packed weight of a job, and its error if it is measured."""
    module, leaf = owner_of(model, job.names[0])
    with ordinary_tensors():
        weight = weight_matrix(module, leaf).detach()
        weight = weight if job.device is None else weight.to(job.device)
        blocks = None if taken is None else taken.blocks(job.names, job.fmt)
        packed = pack_weight(weight, job) if blocks is None else blocks.to(weight.device)
        error = relative_error(weight, packed, job.fmt) if job.options.measure_error else None
        return PackedParameter(packed), error


def _move_rest(model: nn.Module, device: torch.device, placed: set[int]) -> None:
    """Move everything that was not packed to `device`."""
    for module in model.modules():
        if id(module) not in placed:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
