"""The rows of a sweep as text."""

from __future__ import annotations

from collections.abc import Sequence

from isqtorch.text import markdown_table

from .checks import CHECKS, FORMAT, OTHER, Row
from .known import KNOWN

_HEAD = ["type", "class", "packed", "bits", "remarks"]


def markdown(rows: Sequence[Row], version: str) -> str:
    """The page docs/models.md."""
    built = [row for row in rows if not row.not_built]
    passed = sum(not row.failures for row in built)
    run = sum(row.error is not None for row in built)
    lines = [
        "# Models",
        "",
        f"`make sweep` writes this page: it makes a small model of every type that transformers {version} has, with random",
        f"weights, and checks it in `{FORMAT}` and `{OTHER}`. Of {len(rows)} types, {len(built)} were made, and {passed} pass every",
        f"check; failures are explained in bold. Inputs were found for {run}: the others were not called.",
        "",
        *(f"- {check}: {text}" for check, text in CHECKS.items()),
        "",
        f"`packed` is the share of all weights that are packed in `{FORMAT}`, and `bits` the size of the model per weight,",
        "with everything that is not packed. The models are small, so tables and norms are a larger part than in real ones.",
        "",
        markdown_table(_HEAD, [_cells(row) for row in built]),
    ]
    others = [row for row in rows if row.not_built]
    if others:
        lines += [
            "",
            "## Not checked",
            "",
            "No small model of these types is made here; this says nothing about them.",
            "",
        ]
        lines.append(markdown_table(["type", "reason"], [[row.kind, _safe(row.not_built)] for row in others]))
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    remarks = [f"**{check}**: {KNOWN.get((row.kind, check), why)}" for check, why in row.failures.items()] + row.remarks
    return [row.kind, row.cls, f"{row.share:.0%}", f"{row.bits:.2f}", _safe("; ".join(remarks))]


def _safe(text: str) -> str:
    """Text for a cell of a table: on one line, without its separator."""
    return " ".join(text.replace("|", "/").split())
