"""What all reports share: lists, the table of targets, and the files that a run leaves."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from isqtorch.text import markdown_table

FOLDER = Path(__file__).resolve().parent / "results"
MARK = {True: "yes", False: "**no**", None: "-"}


class Judged(Protocol):
    """A target, and whether it was met; None: nothing was measured."""

    what: str
    against: str

    @property
    def target(self) -> str: ...

    @property
    def measured(self) -> str: ...

    @property
    def met(self) -> bool | None: ...


class Measured(Protocol):
    """What was measured, for a file."""

    def to_json(self) -> dict[str, Any]: ...


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def targets_table(targets: Sequence[Judged]) -> str:
    """A line per target, and whether it was met."""
    rows = [[t.what, t.against, t.target, t.measured, MARK[t.met]] for t in targets]
    return markdown_table(["workload", "compared with", "target", "measured", "met"], rows)


def slug(name: str) -> str:
    """The name of a processor as part of a file name: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def dated(folder: Path, name: str) -> Path:
    """Where today's results go: `<folder>/<name>-<date>.json`."""
    return folder / f"{name}-{time.strftime('%Y-%m-%d')}.json"


def write(results: Measured, report: str, path: Path, draw: Callable[[Path], None] | None = None) -> list[Path]:
    """JSON, Markdown and, with matplotlib, the plot, under the same name; returns what was written."""
    paths = [save(results, path), path.with_suffix(".md")]
    paths[1].write_text(report, encoding="utf-8")
    if draw is not None:
        try:
            draw(path.with_suffix(".png"))
        except ImportError:
            print("no plot: pip install matplotlib")
        else:
            paths.append(path.with_suffix(".png"))
    return paths


def save(results: Measured, path: Path) -> Path:
    """Write the JSON alone; what was there before stays whole until the new file is."""
    path = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results.to_json(), indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def tell(paths: Sequence[Path], faults: Sequence[str] = ()) -> int:
    """Say what was written, and what of ours went wrong; the exit status."""
    print("\nwritten: " + ", ".join(map(str, paths)))
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0
