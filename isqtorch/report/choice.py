"""Choice: what "auto" measured and chose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """What a format comes to for an item."""

    bytes: int
    cost: float  # see sensitivity.py
    error: float  # squared error of the weights over their squares


@dataclass(frozen=True)
class Choice:
    """What "auto" measured and chose, one entry per item.

    Attributes:
        measure: "kl", "output" or "weight": the unit of the costs; see sensitivity.py.
        budget: what was asked for, in words.
        items: names, the chosen format, and what every format comes to.
        predicted: total cost of the choice: with "kl", nats per token.
    """

    measure: str
    budget: str
    items: list[tuple[list[str], str, dict[str, Measured]]]
    predicted: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
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
