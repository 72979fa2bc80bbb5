"""Divergence against bits per weight: a line per family and way to quantize it.

Every point has its label, and no label lies on another one or on a point. Families differ by colour and marker, and ways
by line and filling, so that the plot can be read in print without colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot
from matplotlib.transforms import Bbox

from isqtorch.formats import get_format

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
        place_labels(axes, [row for row in results.rows[1:] if (family(row.spec) in _RIGHT) == right], families)
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


def place_labels(axes: pyplot.Axes, rows: list[Quality], families: list[str]) -> None:
    """One label for every spec, at its lowest point, where there is room; a line leads to it from farther away."""
    axes.figure.canvas.draw()  # decides the layout, so that positions in pixels are final
    renderer = axes.figure.canvas.get_renderer()
    lowest: dict[tuple[str, float], Quality] = {}
    for row in rows:
        key = row.spec, round(row.bits_per_weight, 2)
        if key not in lowest or row.scores[0].distance < lowest[key].scores[0].distance:
            lowest[key] = row
    points = [axes.transData.transform((row.bits_per_weight, row.scores[0].distance)) for row in rows]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    for row in sorted(lowest.values(), key=lambda row: row.bits_per_weight):
        color = f"C{families.index(family(row.spec))}"
        place = row.bits_per_weight, row.scores[0].distance
        note = axes.annotate(
            row.spec,
            place,
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=9,
            color=color,
            annotation_clip=False,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
        for dx, dy in _offsets():
            note.set_position((dx, dy))
            note.set_horizontalalignment("left" if dx > 3 else "right" if dx < -3 else "center")
            note.set_verticalalignment("bottom" if dy > 3 else "top" if dy < -3 else "center")
            box = note.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and box.y1 <= axes.bbox.y1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        if math.hypot(dx, dy) > 12:
            axes.annotate(
                "",
                place,
                textcoords="offset points",
                xytext=(dx, dy),
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": color},
            )


def _offsets() -> Iterator[tuple[float, float]]:
    """Places for a label around its point, in points of print, the nearest first, and those beside the lines."""
    for distance in range(10, 120, 8):
        for angle in (-135, 45, -160, 20, -110, 70, 180, 0, -90, 90, -45, 135):  # lines fall from left to right
            yield distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
