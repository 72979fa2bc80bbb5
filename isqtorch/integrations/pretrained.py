"""Load folders and ids of transformers models, with `from_pretrained`, and quantize them while they are read."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from isqtorch import checkpoint as own_file
from isqtorch.formats import AUTO, KEEP, mix_name
from isqtorch.importance.calibration import collect_imatrix
from isqtorch.importance.imatrix import Imatrix
from isqtorch.importance.windows import is_self, token_windows
from isqtorch.inplace.quantize import quantize_
from isqtorch.inplace.requantize import requantize_
from isqtorch.inplace.streaming import Misfit
from isqtorch.policy.inventory import inspect_model, packed_names
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request
from isqtorch.quantizers.families import FEEDBACK
from isqtorch.report.plan import plan
from isqtorch.report.report import QuantReport
from isqtorch.text import first_names

from .hub import naming_hub
from .opening import Opened, needs_transformers

NEARLY = "q8_0"
"""In which a model runs over a calibration text if it can run neither as floats nor layer by layer."""


def from_transformers(
    found: Opened,
    request: Request | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    progress: bool | None,
) -> tuple[Any, QuantReport, Imatrix | None]:
    """Load a transformers model; see `load_opened`. Returns the model, its report, and the importance collected for it."""
    if found.has_own_header:
        return _from_own_file(found, dtype, device)
    later = request is not None and runs_first(request)
    settings: dict[str, Any] = {} if device is None else {"device_map": str(device)}
    misfit = ""
    if request is not None and streams(request):
        from .transformers import IsqConfig

        options = request.options
        text = {"calibration_file": options.calibration_file, "tokenizer": found.companions.tokenizer}
        config, later = IsqConfig(request.fmt, **_for_config(options), **text), False
        try:
            model, info = _pretrained(found, progress, dtype=dtype or "auto", quantization_config=config, **settings)
        except Misfit as fault:
            misfit, later = str(fault), True
            first = Request(None if request.fmt is None else NEARLY, options, "load")
            settings["quantization_config"] = IsqConfig(first.fmt, **_for_config(options.lasting()))
            model, info = _pretrained(found, progress, dtype=dtype or "auto", **settings)
    elif found.is_decoded or (request is not None and not later):
        from .transformers import IsqConfig

        first = Request(KEEP, Options(), "load") if later or request is None else request
        settings["quantization_config"] = IsqConfig(first.fmt, **_for_config(first.options))
        model, info = _pretrained(found, progress, dtype=dtype or "auto", **settings)
    else:
        model, info = _pretrained(found, progress, dtype=dtype or "auto", **settings)
    missing = sorted(info["missing_keys"])
    without = ""
    if missing and _is_pooler(found, missing):  # encoders for embeddings are often stored without it
        del model
        model, info = _pretrained(found, progress, dtype=dtype or "auto", add_pooling_layer=False, **settings)
        without, missing = "without the pooler, which the files do not have", sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{found} and loads as {type(model).__name__}, but it has no {first_names(missing, 2)}, which would be filled with random "
            "numbers. Its config.json names another class than its weights are of, or files are missing."
        )
    model.eval()
    imatrix = None
    if later:
        assert request is not None
        report, imatrix = changed(model, request, found.companions.tokenizer)
    else:
        report = getattr(model, "isq_report", None) or QuantReport.of_packed(inspect_model(model))
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        report.notes.append(
            f"{len(unexpected)} tensors of {found.source} have no place in {type(model).__name__}: {first_names(unexpected)}"
        )
    if without:
        report.notes.append(without)
    if misfit:
        report.notes.append(
            f"moments collected with weights in {NEARLY}, because the model cannot run layer by layer: {misfit}"
        )
    return model, report, imatrix


def streams(request: Request) -> bool:
    """Whether a text is fed to the model layer by layer while it is loaded. `max_memory` asks for passes instead."""
    options = request.options
    return (
        options.rule == FEEDBACK
        and isinstance(options.calibration_file, Path)  # a model writes a text, or reads ids, when it is loaded
        and options.imatrix is None
        and mix_name(request.fmt) not in (AUTO, KEEP)
        and options.max_memory is None
    )


def _pretrained(found: Opened, progress: bool | None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The model and what transformers says about missing and unexpected keys."""
    with needs_transformers():
        from transformers import utils

        from .transformers.findings import loaded
    try:
        with naming_hub(found.source), _bars(utils, progress):
            load = partial(
                found.auto.from_pretrained,
                found.source,
                local_files_only=found.local,
                adapter_kwargs={"local_files_only": found.local},  # else it asks the Hub for an adapter all the same
                trust_remote_code=found.trust_remote_code,
                **settings,
            )
            return loaded(load)
    except SafetensorError as error:
        raise ValueError(f"{found.source}: a file is damaged: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{found.source}: its tensors have other shapes than its config.json says; the report of transformers above lists them"
        ) from error


def _is_pooler(found: Opened, missing: Sequence[str]) -> bool:
    """Whether only the pooler is missing, which the class can do without."""
    optional = found.cls is not None and "add_pooling_layer" in inspect.signature(found.cls.__init__).parameters
    return optional and all("pooler" in name.split(".") for name in missing)


def _from_own_file(
    found: Opened, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[Any, QuantReport, None]:
    """A folder with a file of `isqtorch.checkpoint.save`."""
    model = found.empty(dtype)
    own_file.load_(model, Path(found.source))
    model.eval()
    if device is not None:
        model.to(device)
    report = getattr(model, "isq_report", None) or QuantReport.of_packed(inspect_model(model))
    return model, report, None


def runs_first(request: Request) -> bool:
    """Whether the model has to run, or to be whole, before it can be quantized."""
    return request.options.calibration_file is not None or request.options.probe is not None


def _for_config(options: Options) -> dict[str, Any]:
    """The options that IsqConfig takes."""
    names = ("topology", "organization", "imatrix", "include", "exclude", "fallback", "rule", "activations")
    return {name: getattr(options, name) for name in (*names, "target_bpw", "max_size", "formats")}


def calibrated(model: Any, request: Request, tokenizer: Any) -> tuple[QuantReport, Imatrix | None]:
    """Quantize a float model that runs over the calibration file first."""
    options, imatrix = request.options, None
    given = given_options(options)
    if options.rule == FEEDBACK and options.calibration_file is not None and options.imatrix is None:
        return quantize_(model, request.fmt, **given, calibration=options.calibration_file, tokenizer=tokenizer), None
    auto, text = mix_name(request.fmt) == AUTO, options.calibration_file
    if text is not None and options.imatrix is None:
        if not auto:
            asked = {name: given[name] for name in given if name not in ("rule", "imatrix", "progress", "probe")}
            plan(model, request.fmt, **asked)  # raises errors before minutes of calibration
        windows = token_windows(model, text, tokenizer, "load", progress=options.progress)
        imatrix = collect_imatrix(model, windows, tokenizer, progress=options.progress)
        given["imatrix"] = imatrix
        text = windows.ids if is_self(text) else text  # so that the model writes once
    if auto and text is not None:
        given |= {"calibration": text, "tokenizer": tokenizer}
    return quantize_(model, request.fmt, **given), imatrix


def changed(model: Any, request: Request, tokenizer: Any) -> tuple[QuantReport, Imatrix | None]:
    """Pack a model anew that has run with the weights of its file, or whose weights "auto" measures in the file."""
    if not packed_names(model):
        return calibrated(model, request, tokenizer)
    options, imatrix = request.options, None
    given = given_options(options)
    if options.rule == FEEDBACK and options.calibration_file is not None and options.imatrix is None:
        given |= {"calibration": options.calibration_file, "tokenizer": tokenizer}
    elif options.calibration_file is not None and options.imatrix is None:
        imatrix = collect_imatrix(model, options.calibration_file, tokenizer, progress=options.progress)
        given["imatrix"] = imatrix
    return requantize_(model, request.fmt, **given), imatrix


def given_options(options: Options) -> dict[str, Any]:
    """The options that are not defaults, without the calibration file."""
    return {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if getattr(options, field.name) != field.default
        and field.name not in ("calibration", "calibration_file", "tokenizer")
    }


@contextmanager
def _bars(utils: Any, wanted: bool | None) -> Iterator[None]:
    """Show transformers' progress bars, or do not; None: if stderr is a terminal. Its warnings stay."""
    logging = utils.logging
    shown = logging.is_progress_bar_enabled()
    (
        logging.enable_progress_bar
        if wanted or (wanted is None and sys.stderr.isatty())
        else logging.disable_progress_bar
    )()
    try:
        yield
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
