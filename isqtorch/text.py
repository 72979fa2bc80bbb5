"""Text for people: sizes, lists of names, names that stand for many, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def human_size(nbytes: int) -> str:
    """Decimal units, as file managers and vendors count: 8.39 MB."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def first_names(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and how many more there are: "a, b and 7 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_IN_PATH = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a path
_IN_SENTENCE = re.compile(r"(?<=[A-Za-z_]\.)\d+(?=[.,;:)\s]|$)")  # that of a path in a sentence, but not the 5 of 4.5


def without_numbers(text: str) -> str:
    """A path, or a sentence that names one, with `*` for numbers of layers: "layers.0.up" is "layers.*.up"."""
    return _numbers_of(text).sub("*", text)


def common_name(texts: Sequence[str]) -> str:
    """One text for all that `without_numbers` makes equal: "layers.0.up" and "layers.1.up" are "layers.[0-1].up"."""
    pattern = _numbers_of(texts[0])
    columns = iter([set(column) for column in zip(*(pattern.findall(text) for text in texts), strict=True)])

    def joined(match: re.Match[str]) -> str:
        column = next(columns)
        return match[0] if len(column) == 1 else f"[{ranges(map(int, column))}]"

    return pattern.sub(joined, texts[0])


def _numbers_of(text: str) -> re.Pattern[str]:
    return _IN_SENTENCE if " " in text else _IN_PATH


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns aligned with spaces; `right` are the indices of right-aligned columns."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = []
    for row in [headers, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """The same as a Markdown table."""
    rule = ["--:" if i in right else "---" for i in range(len(headers))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [headers, rule, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
