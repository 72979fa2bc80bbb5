"""Two panels: packed GB/s at one row, TFLOPS at 512."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

from .results import BF16, GGML, MEMORY, OURS, Case, Results


def draw(results: Results, path: Path) -> None:
    """One column per format: our point, ggml's, and lines for what the machine or torch does."""
    figure, (few, many) = pyplot.subplots(2, 1, figsize=(8, 7), layout="constrained")

    names = [group.split()[1] for group in results.groups("hot")]
    _points(few, names, [results.find(f"hot {name}", OURS, format=name, m=1) for name in names], "gbytes", OURS)
    _points(few, names, [results.find(f"hot {name}", GGML, m=1) for name in names], "gbytes", GGML)
    for group, style in (("read hot, as much as a q4_0 matrix", "-"), ("read from memory", "--")):
        read = results.find(group, MEMORY, threads=1)
        if read:
            few.axhline(read.gbytes, color="0.5", linestyle=style, linewidth=1, zorder=1, label=group)
    few.set_ylabel("packed GB/s")
    few.set_title("One row of x, one matrix hot, one thread: higher is better")

    _points(many, names, [results.find(f"many {name}", OURS, m=512) for name in names], "tflops", OURS)
    _points(many, names, [results.find(f"many {name}", GGML, m=512) for name in names], "tflops", GGML)
    _points(many, names, [results.find(f"many {name}", BF16, m=512) for name in names], "tflops", BF16)
    many.set_ylabel("TFLOPS")
    many.set_title("512 rows of x, one thread: higher is better")

    for axes in (few, many):
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(names)), names, rotation=60)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _points(axes: pyplot.Axes, names: list[str], cases: list[Case | None], value: str, who: str) -> None:
    color, marker = {OURS: ("C0", "o"), GGML: ("C1", "s"), BF16: ("0.5", "_")}[who]
    found = [(i, getattr(case, value)) for i, case in enumerate(cases) if case]
    if found:
        axes.scatter(*zip(*found, strict=True), s=36, color=color, marker=marker, label=who, zorder=3)
