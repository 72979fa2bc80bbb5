"""plan: predict what quantize_ does, without reading a weight.

For a live model, also on the meta device, the prediction is exact. For a checkpoint it is, too, if a describer makes
the model of its configuration on the meta device. Else only names and shapes are known: rules that need a module's
class do not apply, and the kind of a layer is guessed from its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from isqtorch.files.checkpoints import Checkpoint, read_headers
from isqtorch.formats import Spec
from isqtorch.policy.activations import check_activations
from isqtorch.policy.decide import decide
from isqtorch.policy.foreign import check_foreign
from isqtorch.policy.headers import describe_headers
from isqtorch.policy.inventory import Inventory, check_model, inspect_model
from isqtorch.policy.options import Activations, Fallback, Names, Options, Organization
from isqtorch.policy.request import Request
from isqtorch.policy.topology import TopologyLike
from isqtorch.policy.words import explaining

from .report import QuantReport


@explaining("plan(model, {})")
def plan(
    model: nn.Module | str | os.PathLike[str],
    fmt: Spec | None,
    *,
    topology: TopologyLike | None = None,
    organization: Organization = "default",
    include: Names | None = None,
    exclude: Names | None = None,
    fallback: Fallback = "up",
    device: torch.device | str | None = None,
    activations: Activations | None = None,
) -> QuantReport:
    """Predict the report of `quantize_` or `load`: formats, sizes, promotions, fallbacks, and layers that stay as they are.

    No weight is read. For a checkpoint the prediction is exact if transformers is installed and knows its type; else a
    note says that rules which need the model's classes do not apply.

    Args:
        model: a live model; a folder with safetensors files and, for a transformers model, its config.json; one
            .safetensors file; a .gguf file or an MLX folder, whose packed weights would be packed anew; or a model id
            on the Hugging Face Hub, of which only the headers are downloaded.
        fmt: see `quantize_`. "auto" is refused, because it has to measure weights.
        topology, organization, include, exclude, fallback, activations: see `quantize_`.
        device: the device that the model will be on. It decides which format a number of bits means; None: the device
            of each layer, the CPU for a checkpoint.

    Returns:
        A report with `planned=True`; sizes in bytes.

    Raises:
        ValueError: an option is bad, the checkpoint is damaged or already quantized, or another quantizer holds layers of
            the model.
        OSError: a file or folder does not exist, or the Hub cannot be reached or does not have the model.

    Example:
        report = isqtorch.plan("examples/demo_model/model", 4)
        print(report.bytes_before, report.bytes_after, report.bits_per_weight)
    """
    options = Options(
        topology=topology,
        organization=organization,
        include=include,
        exclude=exclude,
        fallback=fallback,
        device=device,
        activations=activations,
    )
    if isinstance(model, nn.Module) or isinstance(fmt, nn.Module):
        check_model(model, "plan", fmt)
    request = Request(fmt, options, "plan")
    if isinstance(model, nn.Module):
        inventory = inspect_model(model)
        check_foreign(inventory.foreign, request)
        return planned(inventory, request)
    inventory, notes, _ = read_checkpoint(model)
    return planned(inventory, request, notes)


class Described(NamedTuple):
    """A checkpoint whose weights were not read."""

    inventory: Inventory
    notes: list[str]  # for the report
    config: Mapping[str, Any]  # as in config.json


class Describer(Protocol):
    """A library that knows classes of models. It describes a checkpoint as the model that it would be."""

    def other(self, source: object) -> Described | None:
        """Describe a checkpoint of another program, such as a GGUF file; None for every other source."""

    def model(self, found: Checkpoint) -> Inventory | str:
        """Describe the model that a configuration names, or say why this is not possible."""


_makers: list[Callable[[], Describer]] = []


def register_describer(make: Callable[[], Describer]) -> None:
    """Add a describer, which is made when it is needed.

    This room imports no library of models; `isqtorch.integrations` registers one.
    """
    _makers.append(cache(make))


def planned(inventory: Inventory, request: Request, notes: Sequence[str] = ()) -> QuantReport:
    """The predicted report of a request. `notes` are added to it."""
    inventory = inventory.on(request.device)
    verdict = decide(inventory.layers, request)
    report = QuantReport.build(inventory, verdict, request.fmt, planned=True)
    report.notes += [*notes, *check_activations(inventory.layers, verdict, request)]
    return report


def read_checkpoint(source: str | os.PathLike[str]) -> Described:
    """Describe a checkpoint. Errors are those of `plan`."""
    for make in _makers:
        other = make().other(source)
        if other is not None:
            return other
    found = read_headers(source)
    stored = found.config.get("quantization_config") or found.config.get("quantization")
    if "isqtorch" in found.metadata:
        raise ValueError(f"{source}: is quantized by isqtorch already; plan takes the original model")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        by = "isqtorch" if method == "isq" else method or "MLX"
        way = "plan takes the original model" if method else "plan takes a folder on this machine"
        raise ValueError(f"{source}: is quantized by {by} already; {way}")
    why: Inventory | str = "there is no config.json of a transformers model"
    if "model_type" in found.config:
        for make in _makers:
            why = make().model(found)
            if isinstance(why, Inventory):
                return Described(why, [], found.config)
    inventory, notes = describe_headers(found.headers, found.config)
    return Described(
        inventory,
        [f"planned from names and shapes alone, without the rules that need the model's classes: {why}", *notes],
        found.config,
    )
