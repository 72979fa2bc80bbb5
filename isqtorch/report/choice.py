"""Choice: what "auto" measured and chose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """Size and error of an item in one format."""

    bytes: int
    cost: float  # see auto/sensitivity.py
    error: float  # sum of squared errors of the weights over the sum of their squares


@dataclass(frozen=True)
class Choice:
    """What "auto" measured and chose, one entry per item.

    Attributes:
        measure: "kl", "output" or "weight": the kind of cost that was measured; see auto/sensitivity.py.
        budget: the budget, in words.
        items: for each item the names of its layers, the chosen format, and size and error in every allowed format.
        predicted: total cost of the choice; with "kl" in nats per token.
        notes: for the report.
    """

    measure: str
    budget: str
    items: list[tuple[list[str], str, dict[str, Measured]]]
    predicted: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The record in plain types, for JSON."""
        return {
            "measure": self.measure,
            "budget": self.budget,
            "predicted": self.predicted,
            "items": [
                {
                    "layers": names,
                    "format": chosen,
                    "options": {fmt: row._asdict() for fmt, row in options.items()},
                }
                for names, chosen, options in self.items
            ],
        }
