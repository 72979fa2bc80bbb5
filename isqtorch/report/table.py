"""The tables of a report: a row for every layer, or one row for layers whose names differ only in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from isqtorch.text import common_name, human_size, without_numbers

from .layer import LayerReport

HEAD = ("layer", "count", "shape", "asked", "stored", "bpw", "before", "after", "error", "reason")
NUMBERS = ("count", "shape", "bpw", "before", "after", "error")
"""Columns that are aligned to the right."""

Table = tuple[list[str], list[list[str]]]
"""Column names, and rows."""


def layer_table(layers: Sequence[LayerReport]) -> Table:
    """A row for every layer."""
    return _without_empty([_row([layer]) for layer in layers], leave_out="count")


def folded_table(layers: Sequence[LayerReport], most: int) -> Table:
    """One row for all layers that are equal except for numbers in their names.

    Layers that are not in the requested format come first.

    Args:
        layers: the layers of a report.
        most: largest number of rows. If there are more, a last row tells how many are left out.
    """
    groups: dict[tuple[object, ...], list[LayerReport]] = {}
    for layer in layers:
        path, tied = without_numbers(layer.name), without_numbers(layer.tied_to or "")
        key = (
            path,
            layer.kind,
            layer.shape,
            layer.dtype,
            layer.requested,
            layer.stored,
            without_numbers(layer.reason),
            tied,
        )
        groups.setdefault(key, []).append(layer)
    ordered = sorted(groups.values(), key=lambda group: not group[0].departs)
    rows = [_row(group) for group in ordered[:most]]
    if len(ordered) > most:
        count = sum(len(group) for group in ordered[most:])
        rows.append([f"... {len(ordered) - most} more rows", str(count), *[""] * (len(HEAD) - 2)])
    return _without_empty(rows)


def _row(group: Sequence[LayerReport]) -> list[str]:
    """The row of similar layers: sum of their sizes, largest error."""
    first = group[0]
    errors = [layer.error for layer in group if layer.error is not None]
    sizes = [sum(layer.bytes_before for layer in group), sum(layer.bytes_after for layer in group)]
    return [
        common_name([layer.name for layer in group]),
        str(len(group)),
        " x ".join(map(str, first.shape)),
        first.requested or "-",
        first.stored or first.dtype,
        f"{first.bits_per_weight:.2f}" if first.bits_per_weight else "",
        *(("", "") if first.tied_to else map(human_size, sizes)),
        f"{max(errors):.5f}" if errors else "",
        common_name([layer.reason for layer in group]),
    ]


def _without_empty(rows: list[list[str]], leave_out: str = "") -> Table:
    """The table, without the columns "error" and "reason" if they are empty."""
    optional = [i for i, name in enumerate(HEAD) if name in ("error", "reason") and not any(row[i] for row in rows)]
    kept = [i for i, name in enumerate(HEAD) if name != leave_out and i not in optional]
    return [HEAD[i] for i in kept], [[row[i] for i in kept] for row in rows]
