"""Measure the weights of a checkpoint while transformers reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isqtorch.auto import Auto
from isqtorch.auto.choose import Item, importance_and_shares, moments_for, rules_for
from isqtorch.auto.sensitivity import Error, Sums, errors_of, measure_errors
from isqtorch.formats import get_format
from isqtorch.importance.feedback import Shelf
from isqtorch.importance.imatrix import Imatrix
from isqtorch.importance.moments import Moments


@dataclass
class Meter:
    """Measures the weights of a model during the first reading of "auto"."""

    auto: Auto
    imatrix: Imatrix | None
    rule: str | None
    parts: dict[str, list[Sums]] = field(default_factory=dict)  # by the first name of each weight

    def __post_init__(self) -> None:
        self._shelf = Shelf(self.imatrix if isinstance(self.imatrix, Moments) else None)
        self._weights = {
            layer.name: (item, sharing) for item in self.auto.items for sharing in item.weights for layer in sharing
        }

    def add(self, name: str, weight: Tensor, expert: int | None = None, pieces: int = 1) -> None:
        """Measure a weight `[N, K]` or `[E, N, K]`, or a matrix of one expert in a stack that comes in `pieces`."""
        item, sharing = self._weights[name]
        importance, shares = importance_and_shares(sharing, self.imatrix)
        if expert is not None:
            importance = importance[expert] if importance is not None and importance.dim() == 2 else importance
            shares = None if shares is None else shares[expert : expert + 1]
        formats = [get_format(fmt) for fmt in item.options]
        with torch.no_grad():
            moments = moments_for(sharing, self._shelf, self.rule)
            rules = rules_for(item, sharing, self.rule, importance is not None)
            sums = measure_errors(
                weight, formats, None, importance, shares, rules, pieces, moments=moments, first=expert or 0
            )
        self.parts.setdefault(sharing[0].name, []).append(sums)

    def errors(self, items: Sequence[Item]) -> list[dict[str, Error]]:
        """The errors of items whose weights have all been measured."""
        return [errors_of([sums for sharing in item.weights for sums in self.parts[sharing[0].name]]) for item in items]

    def unseen(self) -> list[str]:
        """Names of the weights that were not in the checkpoint."""
        return [name for name, (_, sharing) in self._weights.items() if sharing[0].name not in self.parts]
