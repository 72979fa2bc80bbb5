"""What every format costs in quality, plain, with an importance matrix and with a search: a table and a plot.

    make quality                                            the demo model, and docs/quality.md
    python -m benchmarks.bench_quality --rows q4k q4k+imatrix afq4+search+imatrix --tokens 4096
    python -m benchmarks.bench_quality --model PATH --text held-out.txt --calibration other.txt --dtype auto
    python -m benchmarks.bench_quality --from FILE.json     the table and plot of a run again, nothing measured

A row is SPEC[+imatrix][+RULE][+OPTION=VALUE]..., whatever isqtorch.quantize_ accepts. Writes quality-<model>-<date>.json, .md and
.png to benchmarks/results. The calibration text must not be the held-out one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from . import output
from .output import FOLDER

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo_model"
PAGE = ROOT / "docs" / "quality.md"
_BEGIN, _END = "<!-- quality:begin -->\n", "<!-- quality:end -->"


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    from .quality.measure import Results

    if args.source:
        results, path = Results.from_json(json.loads(args.source.read_text(encoding="utf-8"))), args.source
    else:
        try:
            results = measure(args)
        except (ValueError, OSError) as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
        path = output.dated(args.output, f"quality-{results.facts['name']}")
    paths = write(results, path)
    if args.docs:
        write_page(results, paths[2])
    return output.tell(paths)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"), help="folder or id; default: the demo model")
    parser.add_argument("--text", type=Path, default=DEMO / "heldout.txt", metavar="FILE", help="held-out text, UTF-8")
    parser.add_argument(
        "--calibration", type=Path, default=DEMO / "calibration.txt", metavar="FILE", help="a text, or an imatrix file"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: every format in every way")
    parser.add_argument(
        "--context", type=int, default=256, help="tokens per window (%(default)s, as the demo model's training)"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the held-out text (%(default)s)")
    parser.add_argument(
        "--dtype", default="float32", help="the model computes in (%(default)s); auto: as its checkpoint says"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--docs", action="store_true", help="also rewrite the table in docs/quality.md")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON")
    args = parser.parse_args(argv)
    if args.model != str(DEMO / "model") and DEMO in (args.text.parent, args.calibration.parent):
        parser.error("--model needs --text and --calibration of its own")
    if args.dtype not in ("auto", "float32", "float16", "bfloat16"):
        parser.error(f"--dtype must be auto, float32, float16 or bfloat16, got {args.dtype}")
    return args


def measure(args: argparse.Namespace) -> Any:
    """Run every row; prints each as it is done."""
    import torch
    from transformers import utils

    from . import host
    from .quality.measure import Session, Settings
    from .quality.rows import Row, default

    utils.logging.disable_progress_bar()
    rows = [Row.parse(text) for text in args.rows] if args.rows else default()
    session = Session(Settings(args.model, args.text, args.calibration, args.context, args.tokens, args.dtype))
    folder = Path(args.model)
    name = "demo-model" if folder == DEMO / "model" else folder.name
    session.results.facts |= {
        "name": name,
        "model": name,
        "text": args.text.name,
        "context": args.context,
        "command": command(args),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "commit": host.commit(),
    }
    for row in rows:
        found = session.measure(row)
        if found:
            print(
                f"{row.name:28} {found.bits_per_weight:6.2f} bpw  ppl {found.perplexity:8.3f}  KL {found.kl:.5f}",
                flush=True,
            )
        else:
            print(f"{row.name:28} skipped: {session.results.skipped[row.name]}", flush=True)
    return session.results


def command(args: argparse.Namespace) -> str:
    """What measures the same again; files by their names alone."""
    given = {"--tokens": args.tokens, "--context": args.context, "--dtype": args.dtype}
    options = [f"{option} {value}" for option, value in given.items()]
    if Path(args.model) != DEMO / "model":
        options += [f"--model {Path(args.model).name} --text {args.text.name} --calibration {args.calibration.name}"]
    if args.rows:
        options.append("--rows " + " ".join(args.rows))
    return " ".join(["python -m benchmarks.bench_quality", *options])


def write(results: Any, path: Path) -> list[Path]:
    """JSON, Markdown and plot; returns what was written."""
    from .quality import plot, tables

    picture = path.with_suffix(".png")
    paths = output.write(results, f"# Quality\n\n{tables.markdown(results, picture.name)}\n", path)
    plot.draw(results, picture)
    return [*paths, picture]


def write_page(results: Any, picture: Path, page: Path = PAGE) -> None:
    """Replace what is between the markers in docs/quality.md."""
    from .quality import tables

    head, found, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (found and end):
        raise ValueError(f"{page} has no {_BEGIN.strip()} ... {_END}")
    target = os.path.relpath(picture.resolve(), page.resolve().parent)
    page.write_text(f"{head}{_BEGIN}{tables.markdown(results, target)}\n{_END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
