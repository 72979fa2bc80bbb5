"""plan: what quantize_ would do, without reading a weight.

For a live model (also on the meta device) the answer is exact. For a checkpoint only names and shapes are known: rules that
look at a module's class cannot apply there, and layers are told apart by what models usually call them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from isqtorch.files.checkpoints import read_headers
from isqtorch.formats import Spec
from isqtorch.policy.activations import check_activations
from isqtorch.policy.decide import decide
from isqtorch.policy.headers import describe_headers
from isqtorch.policy.inventory import Inventory, check_model, inspect_model
from isqtorch.policy.options import Activations, Fallback, Names, Options, Organization
from isqtorch.policy.request import Request
from isqtorch.policy.topology import TopologyLike

from .report import QuantReport


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
    """Predict the report of `quantize_`: formats, sizes, promotions, fallbacks and what is left, with reasons.

    Args:
        model: a live model; a folder with safetensors files and, for a transformers model, its config.json; one
            .safetensors file; or a model id on the Hugging Face Hub, whose headers are fetched.
        fmt: see `quantize_`, like the other options.
        device: where the model would end up, which decides what a number of bits means.

    Returns:
        A report with `planned=True`.

    Raises:
        ValueError: a bad option, or a damaged or already quantized checkpoint.
        OSError: no such file or folder, or the Hub cannot be reached or does not have it.
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
    request = Request(fmt, options, "plan")
    if isinstance(model, nn.Module):
        check_model(model, "plan")
        return planned(inspect_model(model), request)
    inventory, notes, _ = read_checkpoint(model)
    return planned(inventory, request, notes)


def planned(inventory: Inventory, request: Request, notes: Sequence[str] = ()) -> QuantReport:
    """The report of a request that is not carried out; `notes` are about the inventory."""
    inventory = inventory.on(request.device)
    verdict = decide(inventory.layers, request)
    report = QuantReport.build(inventory, verdict, request.fmt, planned=True)
    report.notes += [*notes, *check_activations(inventory.layers, verdict, request)]
    return report


def read_checkpoint(source: str | os.PathLike[str]) -> tuple[Inventory, list[str], Mapping[str, Any]]:
    """What a checkpoint holds, notes for the report, and its config.json; errors as those of `plan`."""
    found = read_headers(source)
    stored = found.config.get("quantization_config")
    if "isqtorch" in found.metadata:
        raise ValueError(f"{source}: is quantized by isqtorch already; plan takes the original model")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        by = "isqtorch" if method == "isq" else method
        raise ValueError(f"{source}: is quantized by {by} already; plan takes the original model")
    return *describe_headers(found.headers, found.config), found.config
