"""Measure the CUDA kernels against their targets, in one run, and write what came out.

    python -m benchmarks.bench_ops --device cuda                    all formats; four minutes, and two for whole models
    python -m benchmarks.bench_ops --device cuda --quick            few formats and shapes: to see that it runs
    python -m benchmarks.bench_ops --device cuda --from FILE.json   tables and plot again, nothing measured

Writes <gpu>-<date>.json, .md and .png (with matplotlib) to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from isqtorch import formats, get_format
from isqtorch.cli.doctor import cuda_kernels, machine_facts, versions
from isqtorch.ops import cuda_info
from isqtorch.text import markdown_table

from .. import output
from ..output import FOLDER, bullets, slug, targets_table
from . import generate, targets
from .clock import EventClock, GraphClock
from .contenders import Contender, Ours, OursRounded, Unavailable, peers
from .session import OURS, Results, Session, in_a_line
from .targets import DECODE_SHAPES, QUANTIZE_SHAPE, ROWS, Target, judge

QUICK = ["q4_0", "q4k", "afq4"]

HOW = """Each product was checked before it was timed. A CUDA graph of many products was replayed; the median of 15 replays counts. Copies
of the weight rotate, together four times the second-level cache. x is bf16. "Packed" rates are the bytes of the packed weight over the
time. The FP8 peer gets x in FP8, and nobody's quantizing of x is counted but that of
"isqtorch W8A8" (`activations="fp8"`), which has it in every call. Quantizing is timed with events and includes its wait for
the device. A target counts as met if every format and shape meets it."""


def measure(names: Sequence[str], *, quick: bool, seconds: float, with_models: bool) -> Results:
    """Everything, on the current GPU."""
    began = time.monotonic()
    properties = torch.cuda.get_device_properties(0)
    session = Session(
        "cuda",
        GraphClock(rounds=5 if quick else 15),
        EventClock(rounds=5),
        cache=properties.L2_cache_size,
        deadline=began + seconds * (0.6 if with_models else 1.0),
    )
    results = session.results
    results.facts |= {
        "gpu": properties.name,
        "host": [*machine_facts(), f"CUDA kernels: {cuda_kernels()}"],
        "versions": versions(),
    }
    with torch.inference_mode():
        session.bandwidth()
        results.facts["roof"] = targets.BANDWIDTH if "H100" in properties.name else results.facts["read"]
        bf16, *others = peers(results.skipped)
        contenders = [
            bf16,
            Ours(names),
            *ours_rounded(names, results.skipped),
            *others,
        ]  # some of them tune themselves for long
        shapes = DECODE_SHAPES[:1] if quick else DECODE_SHAPES
        for shape in shapes:
            session.products(contenders, shape, [1, 8, 64] if quick else ROWS)
        session.quantize(names, QUANTIZE_SHAPE)
    if with_models:
        try:
            results.facts["generate"] = generate.measure("cuda", ["q4k"], began + seconds, results.skipped)
        except Exception as error:  # compiling a whole model runs much code of others; what was measured before counts
            results.faults.append(f"generate: {in_a_line(error)}")
    results.facts["seconds"] = round(time.monotonic() - began)
    return results


def ours_rounded(names: Sequence[str], skipped: list[str]) -> list[Contender]:
    """FP8 weights with FP8 activations, if fp8 is measured and the GPU has products for it."""
    if "fp8" not in names:
        return []
    info = cuda_info()
    assert info, "the kernels were just loaded"
    try:
        return [OursRounded(info.formats["fp8"]["max_rows"])]
    except Unavailable as reason:
        skipped.append(f"{OursRounded.name}: {reason}")
        return []


def _misses(found: Sequence[Target]) -> str:
    lines = []
    for target in found:
        missed = [f"{name} {target.show(value)}" for name, value in target.values.items() if not target.good(value)]
        if missed:
            lines.append(f"- {target.what}, against {target.against}: {', '.join(missed)}")
    return "\n".join(lines) or "None."


def _products(results: Results) -> list[str]:
    parts = []
    for n, k in dict.fromkeys((case.n, case.k) for case in results.cases if case.m):
        rows_of_x = sorted({case.m for case in results.cases if case.m and (case.n, case.k) == (n, k)})
        who = dict.fromkeys((case.who, case.format) for case in results.cases if case.m and (case.n, case.k) == (n, k))
        table = []
        for name, format in who:
            cells = []
            for m in rows_of_x:
                case = results.find(name, format, (n, k), m)
                cells.append(f"{1e6 * case.seconds:.1f}" if case else "-")
            one = results.find(name, format, (n, k), rows_of_x[0])
            table.append([name, format, f"{one.rate / 1e12:.2f}" if one else "-", *cells])
        headers = ["who", "format", f"TB/s, M={rows_of_x[0]}", *(f"M={m}" for m in rows_of_x)]
        parts += [f"## {n} x {k}, microseconds", markdown_table(headers, table, right=range(2, len(headers)))]
    return parts


def _quantized(results: Results) -> str:
    cases = [case for case in results.cases if case.m == 0]
    rows = [[c.format, f"{1e3 * c.seconds:.2f}", f"{c.rate / 1e12:.2f}"] for c in cases]
    return markdown_table(["format", "ms", "TB/s read and written"], rows, right=[1, 2]) if rows else "Not measured."


def markdown(results: Results) -> str:
    """The whole report."""
    facts, found = results.facts, judge(results)
    machine = [
        facts["gpu"],
        *facts["host"],
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    ]
    machine += [
        f"reads {facts['read'] / 1e12:.2f} TB/s, copies {facts['copy'] / 1e12:.2f} TB/s",
        f"{facts['seconds']} s in all",
    ]
    speeds = [f"{name}: {speed:.1f}" for name, speed in facts.get("generate", {}).items()]
    parts = [f"# {facts['gpu']}", HOW, "## Targets", targets_table(found), "### Below target", _misses(found)]
    parts += ["## Faults", bullets(results.faults)] if results.faults else []
    parts += [
        "## Machine",
        bullets(machine),
        *_products(results),
        "## Quantizing 4096 x 14336 from bf16",
        _quantized(results),
    ]
    parts += ["## 8B-shaped model, tokens per second, one sequence, `optimize_`", bullets(speeds or ["not measured"])]
    parts += ["## Not measured", bullets(results.skipped or ["nothing was left out"])]
    return "\n\n".join(parts) + "\n"


def draw(results: Results, path: Path) -> None:
    """How many times as fast as bf16, by rows of x: a panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((case.n, case.k) for case in results.cases if case.m))
    figure, panels = pyplot.subplots(
        len(shapes), 1, figsize=(8, 4.5 * len(shapes)), layout="constrained", squeeze=False
    )
    for axes, shape in zip(panels[:, 0], shapes, strict=True):
        for who, format in dict.fromkeys((c.who, c.format) for c in results.cases if c.m and (c.n, c.k) == shape):
            points = []
            for m in ROWS:
                case, bf16 = results.find(who, format, shape, m), results.find("bf16", "bf16", shape, m)
                if case and bf16:
                    points.append((m, bf16.seconds / case.seconds))
            style = "-" if who == OURS else "k-" if who == "bf16" else "--"
            axes.plot(*zip(*points, strict=True), style, marker=".", label=format if who == OURS else f"{who} {format}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows of x")
        axes.set_ylabel("times as fast as bf16")
        axes.set_title(f"{results.facts['gpu']}, {shape[0]} x {shape[1]}: higher is better")
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize="x-small", ncols=3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(results: Results, path: Path) -> list[Path]:
    """JSON, Markdown and, with matplotlib, the plot; returns what was written."""
    return output.write(results, markdown(results), path, lambda picture: draw(results, picture))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=360, help="begin nothing new after so many (default %(default)s)"
    )
    parser.add_argument("--no-models", action="store_true", help="no whole models")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON")
    args = parser.parse_args(arguments)
    if args.source:
        results, path = Results.from_json(json.loads(args.source.read_text(encoding="utf-8"))), args.source
    else:
        try:
            names = [get_format(name).name for name in args.formats or (QUICK if args.quick else formats())]
        except ValueError as error:
            parser.error(str(error))
        if not torch.cuda.is_available():
            print("benchmarks: torch sees no CUDA GPU here", file=sys.stderr)
            return 1
        results = measure(names, quick=args.quick, seconds=args.seconds, with_models=not (args.no_models or args.quick))
        path = output.dated(args.output, slug(results.facts["gpu"]))
    paths = write(results, path)
    print(targets_table(judge(results)))
    return output.tell(paths, results.faults)


if __name__ == "__main__":
    sys.exit(main())
