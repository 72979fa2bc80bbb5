"""Text for people: sizes, lists of names, one name for many layers, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def human_size(nbytes: int) -> str:
    """Format a number of bytes in decimal units, as file managers do: "8.39 MB"."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def first_names(names: Sequence[str], most: int = 5) -> str:
    """Join the first names and count the others: "a, b and 7 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def cause(error: Exception) -> str:
    """The message of an error of the operator `quantize` without that name, for a message that begins with another."""
    return str(error).removeprefix("quantize: ")


_IN_PATH = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a path
_IN_SENTENCE = re.compile(r"(?<=[A-Za-z_]\.)\d+(?=[.,;:)\s]|$)")  # the same for a path in a sentence; not the 5 of 4.5


def without_numbers(text: str) -> str:
    """Replace layer numbers by `*` in a path, or in a sentence with a path: "layers.0.up" becomes "layers.*.up"."""
    return _numbers_of(text).sub("*", text)


def common_name(texts: Sequence[str]) -> str:
    """Merge texts that differ only in layer numbers: "layers.0.up" and "layers.1.up" become "layers.[0-1].up".

    `without_numbers` must give the same result for all `texts`.
    """
    pattern = _numbers_of(texts[0])
    columns = iter([set(column) for column in zip(*(pattern.findall(text) for text in texts), strict=True)])

    def joined(match: re.Match[str]) -> str:
        column = next(columns)
        return match[0] if len(column) == 1 else f"[{ranges(map(int, column))}]"

    return pattern.sub(joined, texts[0])


def _numbers_of(text: str) -> re.Pattern[str]:
    return _IN_SENTENCE if " " in text else _IN_PATH


def ranges(numbers: Iterable[int]) -> str:
    """Format a set of numbers: 0, 1, 2, 5 becomes "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Format a table whose columns are aligned with spaces. `right` holds the indices of right-aligned columns."""
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
    """Format the same table in Markdown."""
    rule = ["--:" if i in right else "---" for i in range(len(headers))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [headers, rule, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)
