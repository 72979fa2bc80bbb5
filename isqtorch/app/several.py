"""One model in several formats: it is read once if its floats fit into memory, and calibrated once."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from isqtorch.integrations.loading import checked_request
from isqtorch.integrations.opening import Opened
from isqtorch.integrations.pretrained import calibrated, streams
from isqtorch.policy.options import Options
from isqtorch.report.fit import memories, overview
from isqtorch.text import human_size

from .model import LoadedModel, options_for


def packed_in_turn(
    source: str,
    formats: Sequence[str | None],
    *,
    opened: Opened,
    device: str | None,
    options: Mapping[str, Any],
    refined: bool = False,
) -> Iterator[tuple[str | None, LoadedModel]]:
    """Give a model in one format after the other. At most one packed model is in memory at a time.

    The bytes are those of loading the model in each format by itself.

    Args:
        source: what `isqtorch.load` takes.
        formats: formats or numbers of bits; None: the weights as they are.
        opened: what `check_request` has returned for the source.
        device: the device to run on; None: the CPU.
        options: further arguments of `isqtorch.load`. A format gets those that apply to it.
        refined: whether the caller will refine each model. That changes norms, which the copies of one model share.

    Raises:
        ValueError, OSError, ImportError: as `LoadedModel`.
    """
    options = dict(options)
    why = None
    if len(formats) > 1:
        why = "refining changes it" if refined else _why_not_once(source, formats, opened, device, options)
    if len(formats) < 2 or why is not None:
        if why is not None:
            print(f"isqtorch: {source} is read once for each format: {why}", file=sys.stderr)
        for isq in formats:
            given = options if len(formats) < 2 else options_for(isq, options)
            loaded = LoadedModel(source, isq, opened=opened, device=device, options=given)
            if loaded.options.get("imatrix") is not None:
                options["imatrix"] = loaded.options["imatrix"]  # so that the text is read once
            yield isq, loaded
            del loaded
        return
    whole = LoadedModel(source, None, opened=opened, device=device)
    notes = list(whole.loaded.report.notes)
    for isq in formats:
        request = checked_request(isq, Options(progress=False, **options_for(isq, options)))
        assert request is not None
        loaded = copy.copy(whole)
        loaded.model, loaded.isq = sharing_copy(whole.model), isq
        loaded.report, imatrix = calibrated(loaded.model, request, whole.tokenizer)
        loaded.report.notes += notes
        if imatrix is not None:
            options["imatrix"] = imatrix
        yield isq, loaded
        del loaded


def sharing_copy(model: Any) -> Any:
    """A copy of a model whose parameters and buffers are the same tensors. Layers of the copy can be replaced."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _why_not_once(
    source: str, formats: Sequence[str | None], opened: Opened, device: str | None, options: Mapping[str, Any]
) -> str | None:
    """Why the float weights cannot be held while all formats are made; None if they can."""
    if opened.checkpoint is not None or opened.is_decoded or opened.quantized_by is not None:
        return "its weights are packed already"
    for isq in formats:
        request = checked_request(isq, Options(**options_for(isq, options)))
        if request is not None and streams(request):
            return "error feedback reads the text layer by layer while the model is loaded"
    if device is not None and not device.startswith("cpu"):
        return f"on {device} there is room for packed weights only"
    try:
        found = overview(source, [isq for isq in formats if isq not in (None, "auto", "keep")] or [8])
    except (ValueError, OSError) as error:
        return f"its size is not known ({error})"
    largest = max(report.bytes_after for report in found.reports.values())
    free = memories()[0].free
    if found.bytes_now + largest + found.largest > free:
        return f"{human_size(found.bytes_now)} of floats and {human_size(largest)} packed do not fit into {human_size(free)}"
    return None
