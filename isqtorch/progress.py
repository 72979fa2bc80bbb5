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
    """A bar that goes on with each of `items`, or by `update()` up to `total`.

    Args:
        what: is going on, in a word.
        unit: what the items are.
        wanted: whether to show it; None: if stderr is a terminal.
    """
    from tqdm import tqdm

    show = sys.stderr.isatty() if wanted is None else wanted
    return tqdm(items, desc=what, unit=unit, total=total, disable=not show)
