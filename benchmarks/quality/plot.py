"""Divergence against bits per weight: a line per family and way to quantize it.

Every point has its label, and no label lies on another one or on a point. Families differ by colour and marker, and ways
by line and filling, so that the plot can be read in print without colours.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from isqtorch.formats import get_format
from isqtorch.report.labels import Label, place_labels

from .measure import Quality, Results

_LINES = {"": ":", "imatrix": "-", "search": "--", "search+imatrix": "-"}
_MARKERS = "osD^vP*X"
_FAMILIES = {
    "absmax": "q4_0 to q8_0",
    "minmax": "q4_1, q5_1",
    "kquants": "K-quants",
    "affine": "afq",
    "codebook": "iq4, mxfp4",
}
_RIGHT = ("afq", "hqq", "fp8", "mixed")
_DPI = 160


def family(spec: str) -> str:
    """Where a format's codes come from; specs that are no format's name are recipes."""
    try:
        solver = get_format(spec).solver
    except ValueError:
        return "mixed"
    return _FAMILIES.get(solver, solver)


def draw(results: Results, path: Path) -> None:
    """Two panels with the same axes, on the first text: left ggml's formats, right the others."""
    figure, panels = pyplot.subplots(1, 2, figsize=(14, 7), sharey=True, sharex=True, layout="constrained")
    families = list(dict.fromkeys(family(row.spec) for row in results.rows[1:]))
    for i, name in enumerate(families):
        axes = panels[int(name in _RIGHT)]
        members = [row for row in results.rows[1:] if family(row.spec) == name]
        for how in dict.fromkeys(_way(row) for row in members):
            label = f"{name} {how}".replace("+", ", ").strip()
            _line(axes, [row for row in members if _way(row) == how], i, label, how)
    for axes, title in zip(panels, ("ggml's formats", "AFQ, HQQ, FP8 and mixtures"), strict=True):
        axes.set_yscale("log")
        axes.margins(x=0.1, y=0.08)  # room for the labels
        axes.set_xlabel("bits per weight of the whole model")
        axes.set_title(title)
        axes.grid(True, which="major", alpha=0.3)
        if axes.lines:
            axes.legend(loc="upper right")
    panels[0].set_ylabel(f"mean {results.facts['measure']}, {results.rows[0].scores[0].text}")
    for axes, right in zip(panels, (False, True), strict=True):
        members = [row for row in results.rows[1:] if (family(row.spec) in _RIGHT) == right]
        points = [(row.bits_per_weight, row.scores[0].distance) for row in members]
        place_labels(axes, labels(members, families), points)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)


def _way(row: Quality) -> str:
    """How a row was quantized, without the options that have a value: rows of "auto" are one line."""
    return "+".join(part for part in row.how.split("+") if "=" not in part)


def _line(axes: pyplot.Axes, rows: list[Quality], number: int, label: str, how: str) -> None:
    rows = sorted(rows, key=lambda row: row.bits_per_weight)
    color = f"C{number}"
    axes.errorbar(
        [row.bits_per_weight for row in rows],
        [row.scores[0].distance for row in rows],
        yerr=[row.scores[0].stderr for row in rows],
        linestyle=_LINES.get(how, ""),
        color=color,
        marker=_MARKERS[number % len(_MARKERS)],
        markerfacecolor=color if "imatrix" in how else "white",
        linewidth=1,
        markersize=6,
        label=label,
    )


def labels(rows: list[Quality], families: list[str]) -> list[Label]:
    """One label for every spec, at its lowest point."""
    lowest: dict[tuple[str, float], Quality] = {}
    for row in rows:
        key = row.spec, round(row.bits_per_weight, 2)
        if key not in lowest or row.scores[0].distance < lowest[key].scores[0].distance:
            lowest[key] = row
    return [
        Label(row.bits_per_weight, row.scores[0].distance, row.spec, f"C{families.index(family(row.spec))}")
        for row in lowest.values()
    ]
