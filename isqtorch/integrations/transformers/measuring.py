"""IsqConfig("auto"): the first of two readings of a checkpoint, which measures what each format would do to each layer.

transformers hands over every weight as the model will hold it, whatever the checkpoint calls it. So the first reading is an
ordinary load, into a model with the smallest of the allowed formats, which is dropped when all weights were measured.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isqtorch.formats import get_format
from isqtorch.imatrix import Imatrix
from isqtorch.integrations.record import METHOD
from isqtorch.inventory import Inventory
from isqtorch.mixed import Auto, Choice
from isqtorch.mixed.auto import Item, importance_of
from isqtorch.mixed.sensitivity import Error, Sums, errors_of, measure
from isqtorch.policy import Request
from isqtorch.prepare import load_imatrix

if TYPE_CHECKING:
    from .config import IsqConfig


@dataclass
class Meter:
    """Measures the weights of a model as they pass by."""

    auto: Auto
    imatrix: Imatrix | None
    rule: str | None
    parts: dict[str, list[Sums]] = field(default_factory=dict)  # by the first name of a weight

    def __post_init__(self) -> None:
        self._weights = {
            layer.name: (item, sharing) for item in self.auto.items for sharing in item.weights for layer in sharing
        }

    def add(self, name: str, weight: Tensor, expert: int | None = None, pieces: int = 1) -> None:
        """A weight `[N, K]` or `[E, N, K]`, or the matrix of one expert out of so many pieces of a stack."""
        item, sharing = self._weights[name]
        importance, shares = importance_of(sharing, self.imatrix)
        if expert is not None:
            importance = importance[expert] if importance is not None and importance.dim() == 2 else importance
            shares = None if shares is None else shares[expert : expert + 1]
        formats = [get_format(fmt) for fmt in item.options]
        with torch.no_grad():
            sums = measure(weight, formats, None, importance, shares, self.rule, pieces)
        self.parts.setdefault(sharing[0].name, []).append(sums)

    def errors(self, items: Sequence[Item]) -> list[dict[str, Error]]:
        """Of some of the items, all of whose weights have been seen."""
        return [errors_of([sums for sharing in item.weights for sums in self.parts[sharing[0].name]]) for item in items]

    def unseen(self) -> list[str]:
        """Weights that the checkpoint lacks."""
        return [name for name, (_, sharing) in self._weights.items() if sharing[0].name not in self.parts]


def choose_while_loading(
    model: Any, config: IsqConfig, inventory: Inventory, checkpoint_files: list[str] | None
) -> tuple[Request, Choice]:
    """Read the files of a checkpoint once, and choose.

    Args:
        model: the model that is being loaded, without weights.
        inventory: of it.

    Raises:
        ValueError: see `Auto`; a checkpoint that does not come from files.
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
    meter = Meter(auto, load_imatrix(config.imatrix), config.rule)
    first = copy.copy(config)
    first.measuring = meter
    settings = copy.deepcopy(model.config)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with torch.device("cpu"):
        type(model).from_pretrained(
            Path(checkpoint_files[0]).parent, config=settings, dtype=model.dtype, quantization_config=first
        )
    unseen = meter.unseen()
    if unseen:  # they stay in float, and count so
        without = replace(request, exclude=[*(request.exclude or []), *(f"^{re.escape(name)}$" for name in unseen)])
        auto = Auto(inventory, without, budget)
    chosen, choice = auto.choose(meter.errors(auto.items), "weight" if config.imatrix is None else "output")
    return replace(request, assigned={**(meter.auto.smallest().assigned or {}), **(chosen.assigned or {})}), choice
