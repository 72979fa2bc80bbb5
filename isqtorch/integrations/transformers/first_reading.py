"""IsqConfig("auto"): the first of two readings of a checkpoint, which measures the error of each format in each layer.

The first reading is an ordinary load, because then transformers converts names and tensors of the checkpoint to those
of the model. It loads into a second model with the smallest allowed formats, which is dropped once all weights are
measured.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isqtorch.auto import Auto
from isqtorch.importance.moments import load_imatrix
from isqtorch.integrations.record import METHOD
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.options import listed
from isqtorch.policy.request import Request
from isqtorch.report.choice import Choice

from .meter import Meter

if TYPE_CHECKING:
    from .config import IsqConfig


def choose_while_loading(
    model: Any,
    config: IsqConfig,
    inventory: Inventory,
    checkpoint_files: list[str] | None,
    stored: dict[str, Any] | None = None,
) -> tuple[Request, Choice]:
    """Read a checkpoint once and choose the formats.

    Args:
        model: the model that is being loaded, still without weights.
        config: the options.
        inventory: the inventory of the model.
        checkpoint_files: the files of the checkpoint.
        stored: its `quantization_config`, if another program has quantized it.

    Returns:
        The request with the chosen formats, and the measurements.

    Raises:
        ValueError: see `Auto`; or the checkpoint does not come from files, or several processes load it.
    """
    budget, request = config.budget(), config.request()
    assert budget is not None
    auto = Auto(inventory, request, budget)
    if not checkpoint_files:
        raise ValueError(f"{METHOD}: 'auto' reads the checkpoint twice, and this one is not in files. Use quantize_.")
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ValueError(
            f"{METHOD}: 'auto' measures whole weights, and here each process reads its share. Choose in one process, save "
            "report.topology(), and give that as topology."
        )
    imatrix = load_imatrix(request.options.imatrix)
    meter = Meter(auto, imatrix, request.options.rule)
    first = copy.copy(config)
    first.measuring = meter
    settings = copy.deepcopy(model.config)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    if stored is not None:
        settings.quantization_config = stored
    with torch.device("cpu"):
        type(model).from_pretrained(
            Path(checkpoint_files[0]).parent, config=settings, dtype=model.dtype, quantization_config=first
        )
    unseen = meter.unseen()
    if unseen:  # they stay float, so their float size counts
        exclude = [*listed(request.options.exclude), *(f"^{re.escape(name)}$" for name in unseen)]
        without = request.changed(exclude=exclude)
        auto = Auto(inventory, without, budget)
    chosen, choice = auto.choose(meter.errors(auto.items), "weight" if imatrix is None else "output")
    return replace(request, assigned={**(meter.auto.smallest().assigned or {}), **(chosen.assigned or {})}), choice
