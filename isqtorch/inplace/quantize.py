"""quantize_: replace the layers of a live model, one by one, in place.

Two phases. First everything that can fail is checked (`prepare.py`), without touching the model. Then each layer is packed
and put in its place, and the original is freed before the next one is read, so that memory peaks at the model plus the
scratch of its largest layer.
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
from isqtorch.policy.inventory import check_model, inspect_model, packed_names
from isqtorch.policy.options import Activations, Fallback, ImatrixLike, Names, Options, Organization, Probe
from isqtorch.policy.request import Request
from isqtorch.policy.topology import TopologyLike
from isqtorch.progress import progress_bar
from isqtorch.quantizers import Rule
from isqtorch.report.report import QuantReport

from .host import announce
from .origin import Origin
from .pack import Job, pack_weight, relative_error
from .prepare import Prepared, check_devices, check_weights, settle


def quantize_(
    model: nn.Module,
    fmt: Spec | None,
    *,
    topology: TopologyLike | None = None,
    organization: Organization = "default",
    imatrix: ImatrixLike | None = None,
    calibration_file: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    include: Names | None = None,
    exclude: Names | None = None,
    fallback: Fallback = "up",
    device: torch.device | str | None = None,
    rule: Rule | None = None,
    activations: Activations | None = None,
    target_bpw: float | None = None,
    max_size: int | str | None = None,
    formats: Sequence[Spec] | None = None,
    probe: Probe | None = None,
    progress: bool | None = None,
    measure_error: bool = False,
) -> QuantReport:
    """Quantize the linear layers, embeddings and experts of a model in place.

    Any nn.Module works. Layers are found by exact type: nn.Linear, nn.Embedding, transformers' Conv1D; fused experts by what
    they hold. What is left as it is (norms, biases, routers, convolutions, position embeddings, layers whose weight other
    code reads directly, ...) is in the report with the reason. The model remembers this request and, if transformers loaded it,
    its checkpoint: `requantize_` starts again from there.

    Args:
        model: the model; must not be itself a layer to quantize.
        fmt: a format name ("q4k", "afq4", "hqq8", "fp8", ...) or a number of bits, which means the best format for the
            device; or a rule for whole models: "q4k_m" and its like are llama.cpp's mixes (docs/guide.md lists them), "auto"
            measures every layer in several formats and chooses the best that fit `target_bpw` or `max_size`. None quantizes
            only what the topology names.
        topology: formats for some of the layers, as a dict or a YAML file; see `isqtorch.topology`. Overrides promotion.
        organization: "default", or "moqe" for the routed experts only.
        imatrix: how much each input column of a layer matters: a dict {layer: f32 [K]}, the path of an importance matrix
            file, or an Imatrix.
        calibration_file: a text to collect an importance matrix from before anything is quantized (`collect_imatrix`), instead
            of `imatrix` ("auto" takes both, and then only measures on the text). The model must be a causal language model
            that can run where it is.
        tokenizer: the model's, for `calibration_file`.
        include: regexes searched in the module path; only layers that match one are quantized.
        exclude: regexes searched in the module path; layers that match one are left as they are.
        fallback: where K is not a multiple of the format's block: "up" takes the next larger format that fits, "skip" leaves
            the layer as it is, "error" refuses before anything is changed.
        device: where the model ends up; every layer is moved there just before it is packed. None: everything stays in place.
        rule: another way to choose the codes, for formats that have one (the report names the others): "search" for afq and
            hqq, slower and closer to the weights, and the only one of theirs that uses importance; "mlx" for afq, MLX's bits.
        activations: "fp8" allows linear layers in fp8 to round x to FP8 as well where that is faster, as torch's allow_tf32 allows
            TF32: on GPUs of compute capability 9.0, for many rows of x. Experts and embeddings are not concerned. None: x is
            used as it is.
        target_bpw: for "auto": the most bits per weight that the report may show (of the whole model, with what is not
            quantized).
        max_size: for "auto", instead: the most bytes the model may have, or a string such as "6GB" or "5.5GiB".
        formats: for "auto": what to choose from; None: every number of bits, in the format that is best for the device.
        probe: for "auto": how to measure. "kl" takes the curvature of the KL divergence on the calibration file (a few
            backward passes); "output" the errors of the layers' outputs, weighed by importance. None: "kl" where there is a
            calibration file. Without importance, errors of the weights.
        progress: a progress bar; None shows one if stderr is a terminal.
        measure_error: also report the relative RMS error of every weight (reads each once more).

    Returns:
        The report: every weight, what it was, what it is, and why.

    Raises:
        ValueError: anything wrong with the request, the importance or the weights (NaN, infinity, meta device). The model is
            as it was.
        OSError: a topology, imatrix or calibration file that cannot be read.
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
        calibration_file=calibration_file,
        tokenizer=tokenizer,
        rule=rule,
        activations=activations,
        target_bpw=target_bpw,
        max_size=max_size,
        formats=formats,
        probe=probe,
        progress=progress,
        measure_error=measure_error,
    )
    request = Request(fmt, options, "quantize_")
    check_model(model, request.op)
    packed = packed_names(model)
    if packed:
        raise ValueError(
            f"quantize_: {packed[0]} is quantized already ({len(packed)} layers are). Use requantize_ to change formats, or "
            "dequantize_ first."
        )
    check_devices(request)
    inventory = inspect_model(model).on(request.device)
    prepared, choice = settle(model, inventory, request, lambda prepared: check_weights(model, prepared))
    origin = Origin.before(model, request)
    for message in prepared.warnings:
        warnings.warn(message, stacklevel=2)
    errors = _replace_layers(model, prepared)
    report = prepared.report(errors, choice)
    report.seconds = time.perf_counter() - began
    origin.attach(model)
    announce(model, report)
    return report


# ---- carrying it out -------------------------------------------------------------------------------------------------


def _replace_layers(model: nn.Module, prepared: Prepared) -> dict[str, float]:
    """Pack layer by layer, and move the rest of the model where it goes; the errors, where they are measured."""
    request = prepared.request
    errors: dict[str, float] = {}
    placed: set[int] = set()
    with progress_bar(request.op, "layer", request.options.progress, total=len(prepared.jobs)) as bar:
        for job in prepared.jobs:
            bar.set_postfix_str(f"{job.names[0]} {job.fmt.name}", refresh=False)
            error = _replace(model, job, placed)
            if error is not None:
                errors.update(dict.fromkeys(job.names, error))
            bar.update()
    permit(model.modules(), request.options.activations)
    if request.device is not None:
        _move_rest(model, request.device, placed)
    return errors


def _replace(model: nn.Module, job: Job, placed: set[int]) -> float | None:
    """Pack one weight and put the packed layers in place; the originals are free when this returns."""
    parameter, error = _packed(model, job)
    done: dict[int, nn.Module] = {}
    for name in job.names:
        path, leaf = locate(model, name)
        old = model.get_submodule(path)
        if old._parameters[leaf] is parameter:
            continue  # the same parent under another name: replaced already
        if id(old) not in done:
            new = to_packed(old, parameter, job.fmt, leaf)
            done[id(old)] = new if job.device is None else new.to(job.device)
            placed.add(id(new))
        put_module(model, path, done[id(old)])
    return error


def _packed(model: nn.Module, job: Job) -> tuple[nn.Parameter, float | None]:
    """The packed weight of a job, and its error if that is wanted."""
    module, leaf = owner_of(model, job.names[0])
    with ordinary_tensors():
        weight = weight_matrix(module, leaf).detach()
        weight = weight if job.device is None else weight.to(job.device)
        packed = pack_weight(weight, job)
        error = relative_error(weight, packed, job.fmt) if job.options.measure_error else None
        return PackedParameter(packed), error


def _move_rest(model: nn.Module, device: torch.device, placed: set[int]) -> None:
    """Everything that was not packed goes to `device` too."""
    for module in model.modules():
        if id(module) not in placed:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
