"""Plot the error and the bits per weight of every layer, in two panels."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from isqtorch.formats import get_format

from .choice import Choice
from .layer import LayerReport

_UNITS = {
    "kl": "KL divergence that the layer adds, nats",
    "output": "relative squared error of outputs x weights",
    "weight": "relative squared error x weights",
}


def draw(
    path: str | os.PathLike[str], layers: Sequence[LayerReport], choice: Choice | None, bits_per_weight: float
) -> None:
    """Draw the plot of `QuantReport.plot`. With a choice of "auto", the upper panel shows all measured formats.

    Args:
        path: the file to write.
        layers: the quantized layers.
        choice: measurements of "auto", or None.
        bits_per_weight: average over the whole model, for the title.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots are drawn with matplotlib: pip install 'isqtorch[plot]'") from error
    if not layers:
        raise ValueError("plot: nothing is quantized, so there is nothing to draw")
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    names = [re.sub(r"^model\.|\.weight$", "", layer.name) for layer in layers]
    at = {layer.name: x for x, layer in enumerate(layers)}
    used = sorted({layer.stored or "" for layer in layers}, key=lambda fmt: get_format(fmt).bits_per_weight)
    measured = choice is not None or any(layer.error for layer in layers)
    width = min(40.0, max(7.0, 0.16 * len(layers)))
    figure, panels = pyplot.subplots(
        1 + measured, 1, figsize=(width, 4.0 + 2.5 * measured), layout="constrained", sharex=True, squeeze=False
    )
    bits = panels[-1][0]
    colors = {fmt: f"C{i}" for i, fmt in enumerate(used)}
    for fmt in used:
        chosen = [layer for layer in layers if layer.stored == fmt]
        heights = [layer.bits_per_weight for layer in chosen]
        bits.bar([at[layer.name] for layer in chosen], heights, color=colors[fmt], label=fmt)
    bits.set_ylabel("bits per weight")
    bits.set_title(f"{bits_per_weight:.2f} bits per weight over the whole model")
    bits.set_xticks(range(len(names)), names, rotation=90, fontsize="xx-small")
    bits.legend(fontsize="small", ncols=len(used))
    if measured:
        errors = panels[0][0]
        if choice is not None:
            for members, chosen_fmt, options in choice.items:
                x = [at[name] for name in members if name in at]
                for fmt, row in options.items():
                    is_chosen = fmt == chosen_fmt
                    if row.cost > 0:
                        color = colors[fmt] if is_chosen else "0.8"
                        errors.scatter(
                            x, [row.cost] * len(x), s=20 if is_chosen else 6, color=color, zorder=1 + is_chosen
                        )
            errors.set_ylabel(_UNITS[choice.measure], fontsize="small")
            errors.set_title("What the chosen formats cost (grey: the others)")
        else:
            known = [layer for layer in layers if layer.error]
            errors.scatter(
                [at[layer.name] for layer in known],
                [layer.error or 0.0 for layer in known],
                s=20,
                color=[colors[layer.stored or ""] for layer in known],
            )
            errors.set_ylabel("relative RMS error of the weights", fontsize="small")
        errors.set_yscale("log")
        errors.grid(True, axis="y", alpha=0.25)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
