"""QuantReport: what happened (or would happen) to every weight of a model, for people and for programs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isqtorch.policy.decide import Decision, Verdict
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.topology import Topology
from isqtorch.quantizers import Rule
from isqtorch.text import human_size, markdown_table, text_table

if TYPE_CHECKING:
    from .choice import Choice
from .layer import LayerReport, report_layer
from .table import NUMBERS, folded_table, layer_table

JSON_VERSION = 1
_MOST_ROWS = 40  # of the printed table


@dataclass
class QuantReport:
    """The whole model. `print(report)` fits on a screen; `print(report.details())` has a line for every layer.

    Attributes:
        layers: one entry per parameter with two or more dimensions, quantized or not, in the order of the model.
        rest_bytes, rest_numel: all other parameters (norms, biases) and saved buffers, which are never quantized.
        requested: the default format as the user wrote it.
        planned: True where nothing was done, only predicted.
        seconds: wall time.
        notes: everything else that the user should know.
        imatrix, rule: where importance came from, if any layer used it, and the rule that was asked for.
        choice: what the format "auto" measured and chose; None for other formats.
    """

    layers: list[LayerReport]
    rest_bytes: int
    rest_numel: int
    requested: str | None = None
    planned: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    imatrix: str | None = None
    rule: Rule | None = None
    choice: Choice | None = None

    @classmethod
    def build(
        cls, inventory: Inventory, verdict: Verdict, requested: object, *, planned: bool = False, again: bool = False
    ) -> QuantReport:
        """The report of decisions that are, or will be, carried out as they stand.

        Args:
            inventory: the weights.
            verdict: what was decided about each.
            requested: the format that was asked for.
            planned: nothing is carried out.
            again: layers that have their format already are packed once more.
        """
        pairs = zip(inventory.layers, verdict.decisions, strict=True)
        rows = [report_layer(layer, decision, again) for layer, decision in pairs]
        name = None if requested is None else str(getattr(requested, "name", requested))
        return cls(rows, inventory.rest_bytes, inventory.rest_numel, name, planned, notes=list(verdict.notes))

    @classmethod
    def of_packed(cls, inventory: Inventory) -> QuantReport:
        """The report of a model that is as it was loaded."""
        decisions = [Decision(layer.name, None, None, layer.keep or "") for layer in inventory.layers]
        return cls.build(inventory, Verdict(decisions, []), None)

    def __getitem__(self, name: str) -> LayerReport:
        """The entry of one layer."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def topology(self) -> Topology:
        """What each layer has now, as a topology: `quantize_(model, None, topology=report.topology())` does the same again.

        Layers that were left are named, too, so that it holds beside any default format. `.save(path)` writes YAML.
        """
        return Topology.exact({layer.name: layer.stored for layer in self.layers if layer.kind != "other"})

    def record(self, choice: Choice) -> None:
        """Take over what "auto" chose: into the notes, and as the layers' errors, RMS over RMS, where none were measured."""
        self.choice = choice
        self.notes += choice.notes
        errors = {name: options[fmt].error ** 0.5 for names, fmt, options in choice.items for name in names}
        for layer in self.layers:
            if layer.error is None:
                layer.error = errors.get(layer.name)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw error and bits of every layer to a file (PNG, SVG, ...).

        Raises:
            ValueError: nothing is quantized.
            ImportError: matplotlib is missing.
            OSError: the file cannot be written.
        """
        from .plot import draw

        draw(path, self.quantized, self.choice, self.bits_per_weight)

    # ---- totals ------------------------------------------------------------------------------------------------------

    @property
    def bytes_before(self) -> int:
        return self.rest_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return self.rest_bytes + sum(layer.bytes_after for layer in self.layers)

    @property
    def numel(self) -> int:
        """Weights in the model, shared ones once, with everything that is not quantized."""
        return self.rest_numel + sum(layer.numel for layer in self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model, with everything that is not quantized."""
        return 8 * self.bytes_after / self.numel if self.numel else 0.0

    @property
    def weights(self) -> list[LayerReport]:
        """The layers without those that share another's weight, like all the lists below."""
        return [layer for layer in self.layers if layer.tied_to is None]

    @property
    def quantized(self) -> list[LayerReport]:
        return [layer for layer in self.weights if layer.stored is not None]

    @property
    def left(self) -> list[LayerReport]:
        return [layer for layer in self.weights if layer.stored is None]

    @property
    def promoted(self) -> list[LayerReport]:
        return [layer for layer in self.quantized if layer.promoted]

    @property
    def fallbacks(self) -> list[LayerReport]:
        return [layer for layer in self.quantized if layer.fell_back]

    # ---- output ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Totals and notes, then a table in which layers that are alike share a row; it fits on a screen."""
        head, rows = folded_table(self.layers, _MOST_ROWS)
        lines = [*self.summary(), "", self._text(head, rows)]
        if sum(row[0].startswith("...") for row in rows[-1:]):
            lines.append("print(report.details()) has every layer")
        return "\n".join(lines)

    def details(self) -> str:
        """The same with a row for every layer."""
        return "\n".join([*self.summary(), "", self._text(*layer_table(self.layers))])

    @staticmethod
    def _text(head: list[str], rows: list[list[str]]) -> str:
        return text_table(head, rows, right=[i for i, name in enumerate(head) if name in NUMBERS])

    def summary(self) -> list[str]:
        """Totals and notes, one line each."""
        verb = "to quantize" if self.planned else "quantized"
        size = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        timing = "" if self.planned else f", {self.seconds:.2f} s"
        return [
            f"{len(self.quantized)} of {len(self.weights)} weights {verb} ({len(self.promoted)} promoted, "
            f"{len(self.fallbacks)} fell back to another format), {len(self.left)} left as they are",
            f"{human_size(self.bytes_before)} -> {human_size(self.bytes_after)} ({100 * size:.1f} %), "
            f"{self.bits_per_weight:.2f} bits per weight over the whole model{timing}",
            f"of that, norms, biases and buffers: {human_size(self.rest_bytes)}",
            *(f"note: {note}" for note in self.notes),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "report_version": JSON_VERSION,
            "requested": self.requested,
            "imatrix": self.imatrix,
            "rule": self.rule,
            "planned": self.planned,
            "seconds": self.seconds,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "rest_bytes": self.rest_bytes,
            "rest_numel": self.rest_numel,
            "notes": self.notes,
            "layers": [layer.to_dict() for layer in self.layers],
            **({} if self.choice is None else {"choice": self.choice.to_dict()}),
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        """A table with a row for every layer, then totals and notes as a list."""
        head, rows = layer_table(self.layers)
        table = markdown_table(head, rows, right=[i for i, name in enumerate(head) if name in NUMBERS])
        return "\n".join([table, "", *(f"- {line}" for line in self.summary())]) + "\n"
