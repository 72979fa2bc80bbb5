"""load: one way in for every model that is a file, a folder or an id. Its class comes from its configuration."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from isqtorch.auto import Budget
from isqtorch.files.binary import regular
from isqtorch.formats import AUTO, KEEP, Spec, mix_name
from isqtorch.importance.imatrix import Imatrix
from isqtorch.importance.windows import is_self
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
from isqtorch.policy.request import Request, checked_device
from isqtorch.policy.topology import TopologyLike
from isqtorch.policy.words import explaining
from isqtorch.report.report import QuantReport

from .opening import Opened
from .pretrained import changed, from_transformers, runs_first
from .record import METHOD

_OP = "load"


@dataclass(frozen=True)
class Loaded:
    """What `isqtorch.load` returns. It can be unpacked: `model, tokenizer, report = isqtorch.load(...)`.

    Attributes:
        model: the model of transformers, in evaluation mode.
        tokenizer: the text tokenizer; None if the model has none.
        report: for every weight its format, its size and the reason. It is `model.isq_report`, too, if any is packed.
        processor: for images or sound, with the tokenizer in it; None for models of text.
        imatrix: the importance matrix that was collected on the calibration file, or None.

    Example:
        loaded = isqtorch.load("examples/demo_model/model", "q4k")
        print(loaded.report.bits_per_weight, type(loaded.model).__name__)
    """

    model: Any
    tokenizer: Any
    report: QuantReport
    processor: Any = None
    imatrix: Imatrix | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer, self.report))


@explaining("load(source, {})")
def load(
    source: str | os.PathLike[str],
    isq: Spec | None = None,
    *,
    topology: TopologyLike | None = None,
    organization: Organization = "default",
    imatrix: ImatrixLike | None = None,
    calibration: CalibrationLike | None = None,
    calibration_file: str | os.PathLike[str] | None = None,
    include: Names | None = None,
    exclude: Names | None = None,
    fallback: Fallback = "up",
    rule: ModelRule | None = None,
    max_memory: int | str | None = None,
    activations: Activations | None = None,
    target_bpw: float | None = None,
    max_size: int | str | None = None,
    formats: Sequence[Spec] | None = None,
    probe: Probe | None = None,
    progress: bool | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model with its tokenizer, from any kind of file, and quantize it if a format is given.

    The class of the model is the one that its configuration names: a language model, one of images and text, of speech,
    an encoder, a classifier, and so on. A model is never completed with random weights: if the files lack any, that is
    an error. Every weight is packed as it is read, so that only the packed model has to fit into memory.

    Args:
        source: the folder of a transformers model, also one that isqtorch has written; a .gguf file, or the first one
            of several; an MLX folder; or the id of a model on the Hub, `owner/name:file.gguf` for a GGUF file there.
            What the local cache has is not looked up on the network.
        isq: the format, as for `quantize_`. None or "keep": the weights stay as they are, packed or not. The weights of
            a GGUF file, an MLX folder, or a folder that another library has quantized (FP8, MXFP4, GPTQ, AWQ, ...) are
            decoded and packed anew, except those that have the format already; their errors stay, and the report says
            so. A folder that isqtorch has quantized takes no format.
        topology, organization, imatrix, include, exclude, fallback, rule, max_memory, activations: see `quantize_`. A
            topology cannot place layers on devices here.
        calibration, calibration_file: see `quantize_`. The model is loaded first, and runs over the text as it is; its float weights
            then have to fit into memory. From a GGUF file or an MLX folder it runs with the packed weights.
        target_bpw, max_size, formats, probe: for "auto", see `quantize_`.
        progress: whether to show progress bars; None: if stderr is a terminal.
        dtype: the float type in which the model computes: a torch.dtype or its name. None: that of the checkpoint; if it
            has none, float32 on the CPU and bfloat16 on other devices.
        device: where the model goes; None: the CPU.
        trust_remote_code: whether to run code from the repository of the model.

    Returns:
        The model in evaluation mode, its tokenizer and the report, see `Loaded`.

    Raises:
        ValueError: an option is bad, or given without a format; the files are damaged, lack weights, or are already
            quantized in another way; or transformers has no class for the model.
        OSError: there is no such file or folder, or the Hub cannot be reached or does not have it.
        ImportError: transformers or accelerate is missing.

    Example:
        model, tokenizer, report = isqtorch.load("examples/demo_model/model", 4)
        print(report)
    """
    options = Options(
        topology=topology,
        organization=organization,
        imatrix=imatrix,
        calibration=calibration,
        calibration_file=calibration_file,
        include=include,
        exclude=exclude,
        fallback=fallback,
        rule=rule,
        max_memory=max_memory,
        activations=activations,
        target_bpw=target_bpw,
        max_size=max_size,
        formats=formats,
        probe=probe,
        progress=progress,
    )
    request = checked_request(isq, options)
    place = None if device is None else checked_device(device, f"{_OP}: device")
    found = Opened.of(source, trust_remote_code=trust_remote_code)
    return load_opened(found, request, dtype=checked_dtype(dtype), device=place, progress=progress)


def checked_request(isq: Spec | None, options: Options) -> Request | None:
    """The request of `load`; None if the weights stay as they are.

    Raises:
        ValueError: an option is bad, or is given and there is no format.
        OSError: a file does not exist.
    """
    if isq is None and not options.topology:
        given = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
        given = [name for name in given if name not in ("progress", "topology")]
        if given:
            raise ValueError(f"{_OP}: {given[0]} needs a format: isq=4, for example")
        return None
    request = Request(isq, options, _OP)
    for entry in request.topology.entries:
        if entry.device is not None:
            raise ValueError(
                f"{_OP}: topology entry {entry.key!r} names a device. Leave it out; device=... is for the whole model."
            )
    Budget.of(_OP, isq, options)
    text = request.options.calibration_file
    if text is not None:
        if isinstance(text, Path):
            if not text.exists():
                raise FileNotFoundError(f"{_OP}: no calibration text {text}")
            regular(text)
        if options.imatrix is not None and mix_name(isq) != AUTO:
            raise ValueError(f"{_OP}: give either imatrix or calibration_file, not both")
    return request


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The float type; ValueError for anything else."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f'{_OP}: dtype must be a float type, such as torch.bfloat16 or "bfloat16"; got {dtype!r:.80}')
    return found


def load_opened(
    found: Opened,
    request: Request | None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: bool | None = False,
) -> Loaded:
    """`load` for a model that is open already. The request is checked."""
    if request is not None and found.quantized_by == METHOD:
        raise ValueError(f"{found.source} is quantized already; give no format, or give the original model")
    if found.checkpoint is not None and request is not None and mix_name(request.fmt) == KEEP:
        request = Request(None, request.options, _OP) if request.topology else None
    if found.is_decoded and request is None:
        request = Request(KEEP, Options(), _OP)
    if request is not None and request.options.calibration_file is not None:
        if is_self(request.options.calibration_file):
            found.check("continues", "calibration='self', which lets the model write a text,")
        else:
            found.check("continues" if mix_name(request.fmt) == AUTO else "reads", "calibration_file")
        if isinstance(request.options.calibration_file, Path):
            found.check_tokenizer("calibration_file")
    load = from_transformers if found.checkpoint is None else _from_checkpoint
    model, report, imatrix = load(found, request, dtype, device, progress)
    return Loaded(model, found.companions.tokenizer, report, found.companions.processor, imatrix)


# ---- checkpoints of other programs -----------------------------------------------------------------------------------


def _from_checkpoint(
    found: Opened,
    request: Request | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    progress: bool | None,
) -> tuple[Any, QuantReport, Imatrix | None]:
    from .checkpoints.assemble import assemble

    assert found.checkpoint is not None
    device = device or torch.device("cpu")
    other = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = found.empty(dtype or found.own_dtype() or other).eval()
    model.config.name_or_path = found.source
    if model.can_generate():
        known = vars(model.generation_config)
        settings = {name: value for name, value in found.checkpoint.generation().items() if name in known}
        model.generation_config.update(**settings)
    later = request is not None and (runs_first(request) or mix_name(request.fmt) == AUTO)
    report = assemble(model, found.checkpoint, None if later else request, device, progress)
    imatrix = None
    if later:
        assert request is not None
        report, imatrix = changed(model, request, found.companions.tokenizer)
    report.notes += found.checkpoint.notes
    if found.companions.why:
        report.notes.append(f"without a tokenizer: {found.companions.why}")
        warnings.warn(f"{_OP}: without a tokenizer: {found.companions.why.removeprefix('load: ')}", stacklevel=5)
    return model, report, imatrix
