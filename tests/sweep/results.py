"""Results on disk: a line of JSON for each type, so that a sweep that is stopped loses nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from .checks import Row


def append(path: Path, row: Row) -> None:
    """Add a result to a file, which is made if it does not exist."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> dict[str, Row]:
    """The results in a file, of each type the last one. A file that does not exist has none."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # a run was killed while it wrote
        lines.pop()
        path.write_text("".join(lines))
    rows = [Row(**json.loads(line)) for line in lines]
    return {row.kind: row for row in rows}
