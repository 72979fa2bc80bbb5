"""Progress bars, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(
    what: str, unit: str, wanted: bool | None, items: Iterable[Any] | None = None, total: int | None = None
) -> tqdm[Any]:
    """Make a progress bar. It advances with each of `items`, or by calls of `update()` up to `total`.

    Args:
        what: one word for the work, shown before the bar.
        unit: what one item is called.
        wanted: whether to show the bar; None shows it if stderr is a terminal.
        items: iterate over these; without them call `update()`.
        total: number of steps, if `items` is None or has no length.
    """
    from tqdm import tqdm

    show = sys.stderr.isatty() if wanted is None else wanted
    return tqdm(items, desc=what, unit=unit, total=total, disable=not show)
