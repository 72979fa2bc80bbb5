"""Divergence against bits per weight: a line per family and way to quantize it."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from isqtorch.formats import get_format

from .measure import Quality, Results

_STYLES = {"": ("o", ":"), "imatrix": ("o", "-"), "search": ("s", "--"), "search+imatrix": ("s", "-")}
_OTHER = ("D", "")
_FAMILIES = {
    "absmax": "q4_0 to q8_0",
    "minmax": "q4_1, q5_1",
    "kquants": "K-quants",
    "affine": "afq",
    "codebook": "iq4, mxfp4",
}
_RIGHT = ("afq", "hqq", "fp8")


def family(spec: str) -> str:
    """Where a format's codes come from; specs that are no format's name are recipes."""
    try:
        solver = get_format(spec).solver
    except ValueError:
        return "mixed"
    return _FAMILIES.get(solver, solver)


def draw(results: Results, path: Path) -> None:
    """Two panels with the same axes: importance and search by family, left ggml's formats, right the others."""
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True, sharex=True, layout="constrained")
    families = list(dict.fromkeys(family(row.spec) for row in results.rows[1:]))
    for i, name in enumerate(families):
        axes = panels[int(name in _RIGHT)]
        members = [row for row in results.rows[1:] if family(row.spec) == name]
        for how in dict.fromkeys(row.how for row in members):
            _line(axes, [row for row in members if row.how == how], f"C{i}", f"{name} {how}".replace("+", ", "), how)
    for axes, title in zip(panels, ("ggml's formats", "AFQ, HQQ, FP8"), strict=True):
        axes.set_yscale("log")
        axes.margins(x=0.08)  # room for the last label
        axes.set_xlabel("bits per weight of the whole model")
        axes.set_title(title)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize="small")
    panels[0].set_ylabel("mean KL divergence from the unquantized model, nats")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(axes: pyplot.Axes, rows: list[Quality], color: str, label: str, how: str) -> None:
    marker, style = _STYLES.get(how, _OTHER)
    rows = sorted(rows, key=lambda row: row.bits_per_weight)
    points = [row.bits_per_weight for row in rows], [row.kl for row in rows]
    filled = color if "imatrix" in how else "white"
    axes.plot(
        *points, style, color=color, marker=marker, markerfacecolor=filled, linewidth=1, markersize=6, label=label
    )
    if how == "" or how not in _STYLES:
        for row in rows:
            axes.annotate(
                row.spec,
                (row.bits_per_weight, row.kl),
                textcoords="offset points",
                xytext=(5, 5),
                fontsize="small",
                color=color,
            )
