"""Labels of points in a plot, none of them on another one or on a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Label(NamedTuple):
    """A text for a point, which is given in the units of the axes."""

    x: float
    y: float
    text: str
    color: str


def place_labels(axes: Any, labels: Sequence[Label], points: Sequence[tuple[float, float]] = ()) -> None:
    """Write a label near each point, where there is room; a line leads to it from farther away.

    Args:
        axes: of matplotlib, with their final limits and scales.
        labels: what to write.
        points: further points that no label may cover.
    """
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()  # decides the layout, so that positions in pixels are final
    renderer = axes.figure.canvas.get_renderer()
    seen = [axes.transData.transform(place) for place in [*((label.x, label.y) for label in labels), *points]]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in seen]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    for label in sorted(labels):
        place = label.x, label.y
        note = axes.annotate(
            label.text,
            place,
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=9,
            color=label.color,
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
            line = {"arrowstyle": "-", "lw": 0.5, "color": label.color}
            axes.annotate("", place, textcoords="offset points", xytext=(dx, dy), arrowprops=line)


def _offsets() -> Iterator[tuple[float, float]]:
    """Places for a label around its point, in points of print, the nearest first, and those beside the lines."""
    for distance in range(10, 120, 8):
        for angle in (-135, 45, -160, 20, -110, 70, 180, 0, -90, 90, -45, 135):  # lines fall from left to right
            yield distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
