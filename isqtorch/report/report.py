"""QuantReport: what was done, or would be done, to every weight of a model, as text and as data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from isqtorch.policy.decide import Decision, Verdict
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.options import ModelRule
from isqtorch.policy.topology import Topology
from isqtorch.text import human_size, markdown_table, text_table

if TYPE_CHECKING:
    from .choice import Choice
from .layer import LayerReport, report_layer
from .table import NUMBERS, folded_table, layer_table

JSON_VERSION = 1
_MOST_ROWS = 40  # of the printed table


@dataclass
class QuantReport:
    """What `quantize_`, `requantize_` or `plan` did to a model, or would do.

    `print(report)` fits on a screen; `print(report.details())` has a line for every layer. `report["lm_head"]` is the
    entry of one layer.

    Attributes:
        layers: one entry per parameter with two or more dimensions, quantized or not, in the order of the model.
        rest_bytes, rest_numel: size in bytes and number of elements of all other parameters (norms, biases) and of
            saved buffers. They are never quantized.
        requested: the default format as the user wrote it.
        planned: True if nothing was done, only predicted.
        seconds: wall time.
        notes: further remarks for the user.
        imatrix: source of the importance matrix, or None if no layer used one.
        rule: the `rule` argument.
        choice: what the format "auto" measured and chose; None for other formats.

    Example:
        report = isqtorch.quantize_(model, "q4k")
        print(report)
        print(report.bits_per_weight, [layer.name for layer in report.left])
    """

    layers: list[LayerReport]
    rest_bytes: int
    rest_numel: int
    requested: str | None = None
    planned: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    imatrix: str | None = None
    rule: ModelRule | None = None
    choice: Choice | None = None

    @classmethod
    def build(
        cls, inventory: Inventory, verdict: Verdict, requested: object, *, planned: bool = False, again: bool = False
    ) -> QuantReport:
        """Build the report of decisions.

        Args:
            inventory: the weights.
            verdict: the decision for each weight.
            requested: the format asked for.
            planned: whether the decisions are only predicted and not carried out.
            again: whether layers that already have their format are packed once more.
        """
        pairs = zip(inventory.layers, verdict.decisions, strict=True)
        rows = [report_layer(layer, decision, again) for layer, decision in pairs]
        name = None if requested is None else str(getattr(requested, "name", requested))
        return cls(rows, inventory.rest_bytes, inventory.rest_numel, name, planned, notes=list(verdict.notes))

    @classmethod
    def of_packed(cls, inventory: Inventory) -> QuantReport:
        """The report of a model that was loaded with packed weights.

        Args:
            inventory: the weights.
        """
        decisions = [Decision(layer.name, None, None, layer.keep or "") for layer in inventory.layers]
        return cls.build(inventory, Verdict(decisions, []), None)

    def __getitem__(self, name: str) -> LayerReport:
        """The entry of one layer; KeyError if there is none of this name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def topology(self) -> Topology:
        """The formats of all layers as a topology. `.save(path)` writes it as YAML.

        `quantize_(model, None, topology=report.topology())` quantizes another copy of the model in the same way. Layers
        that were left are listed too, so the result does not depend on the default format.
        """
        return Topology.exact({layer.name: layer.stored for layer in self.layers if layer.kind != "other"})

    def record(self, choice: Choice) -> None:
        """Add the choice of "auto": its notes, and its relative RMS errors for layers without a measured error.

        Args:
            choice: what "auto" measured and chose.
        """
        self.choice = choice
        self.notes += choice.notes
        errors = {name: options[fmt].error ** 0.5 for names, fmt, options in choice.items for name in names}
        for layer in self.layers:
            if layer.error is None:
                layer.error = errors.get(layer.name)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the error and the bits per weight of every quantized layer to a file.

        Args:
            path: the file to write; its extension selects the type (.png, .svg, ...).

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
        """Size of the model before, in bytes, with everything that is not quantized."""
        return self.rest_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Size of the model afterwards, in bytes, with everything that is not quantized."""
        return self.rest_bytes + sum(layer.bytes_after for layer in self.layers)

    @property
    def numel(self) -> int:
        """Number of weights in the model, including those that are not quantized; shared weights count once."""
        return self.rest_numel + sum(layer.numel for layer in self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Average over the whole model, including everything that is not quantized."""
        return 8 * self.bytes_after / self.numel if self.numel else 0.0

    @property
    def weights(self) -> list[LayerReport]:
        """The layers without those that share the weight of another; so are the five lists below."""
        return [layer for layer in self.layers if layer.tied_to is None]

    @property
    def quantized(self) -> list[LayerReport]:
        """The weights that have a format."""
        return [layer for layer in self.weights if layer.stored is not None]

    @property
    def left(self) -> list[LayerReport]:
        """The weights that stay as they are, each with its reason."""
        return [layer for layer in self.weights if layer.stored is None]

    @property
    def promoted(self) -> list[LayerReport]:
        """Embeddings and output heads that got a larger format than requested."""
        return [layer for layer in self.quantized if layer.promoted]

    @property
    def fallbacks(self) -> list[LayerReport]:
        """The weights whose shape does not fit the requested format, so that they got another one."""
        return [layer for layer in self.quantized if layer.fell_back]

    @property
    def damaged(self) -> list[LayerReport]:
        """The weights that lost much more than usual, each with its error; see `LayerReport.damaged`."""
        return [layer for layer in self.quantized if layer.damaged]

    # ---- output ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Totals, notes and a table that fits on a screen: similar layers share a row."""
        head, rows = folded_table(self.layers, _MOST_ROWS)
        lines = [*self.summary(), "", self._text(head, rows)]
        if sum(row[0].startswith("...") for row in rows[-1:]):
            lines.append("print(report.details()) has every layer")
        return "\n".join(lines)

    def details(self) -> str:
        """Totals, notes and a table with a row for every layer."""
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
        """The report in plain types, for JSON; `report_version` is the version of this layout."""
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
        """The report as JSON text.

        Args:
            indent: spaces per level; None puts everything on one line.
        """
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        """The report as Markdown: a table with a row for every layer, then totals and notes as a list."""
        head, rows = layer_table(self.layers)
        table = markdown_table(head, rows, right=[i for i, name in enumerate(head) if name in NUMBERS])
        return "\n".join([table, "", *(f"- {line}" for line in self.summary())]) + "\n"
