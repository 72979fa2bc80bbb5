"""Measure everything that has a target, in one run, and write what came out.

    python -m benchmarks.report                      all formats: about a quarter of an hour on two cores
    python -m benchmarks.report --quick              a few formats and rounds, no other library than ggml: to see that it runs
    python -m benchmarks.report --formats q4k afq4
    python -m benchmarks.report --from FILE.json     tables and plot of a run again, nothing measured

Writes <cpu>-<date>.json, .md and .png (with matplotlib) to benchmarks/results. README.md says what is measured and how to get the peers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from . import output, tables
from .output import FOLDER, bullets, targets_table
from .peers import MODULES, Unavailable
from .results import Results
from .targets import judge

QUICK = ["q4_0", "q3k", "q4k", "afq4", "fp8"]

HOW = """Everything ran in turns within one run: a round of ours, a round of theirs, again. Medians. On one thread the clock is the CPU
time of the process, which leaves out waiting for a core, but not what a neighbour on the host costs who shares the core's caches and
vector or tile units: compare within a line, and lines with care. With two threads, and wherever one and two are compared, it is wall
time. Weights are 4096 x 4096, x is bf16 for us and f32 for ggml. "DRAM" rotates through copies of the weight that together exceed 1 GB,
"hot" uses one again and again. A target counts as met if every format meets it."""


def measure(names: list[str], *, quick: bool, peers: bool) -> Results:
    """Run all groups of these formats, and the peers."""
    import torch

    from . import host
    from .measure import Budget, Session

    began = time.perf_counter()
    skipped: list[str] = []
    tiers = host.tiers(skipped)
    facts = host.facts(tiers)  # before numbers of threads are set
    session = Session(Budget(few=5, many=2, turn=0.005) if quick else Budget(), tiers)
    session.results.skipped += skipped
    session.results.facts |= {"host": facts, "pace": session.pace}
    with torch.inference_mode():
        session.roofline()
        for name in names:
            session.format(name)
        for name in MODULES if peers and not quick else ():
            if name != "ggml":
                host.with_peer(name, session)
    session.results.facts["seconds"] = round(time.perf_counter() - began)
    session.close()
    return session.results


def markdown(results: Results) -> str:
    """The whole report."""
    targets = judge(results, results.facts["pace"])
    parts = [
        "# Benchmark report",
        HOW,
        "## Targets",
        targets_table(targets),
        "### Below target",
        tables.misses(targets),
        "## Machine",
        bullets([*results.facts["host"], *tables.roofline(results), f"{results.facts['seconds']} s in all"]),
        "## One and eight rows of x",
        tables.few_table(results),
        "## 128 and 512 rows of x, TFLOPS",
        tables.many_table(results),
    ]
    if results.groups("tier"):
        parts += ["### Both sides kept to an older instruction set", tables.many_table(results, "tier")]
    parts += ["## Quantizing, millions of weights per second on one thread", tables.quantize_table(results)]
    parts += ["## Two threads over one, wall time", tables.threads_table(results)]
    parts += ["## Other libraries, one matrix hot, one thread", tables.peers_table(results)]
    parts += ["## Not measured", bullets(results.skipped or ["nothing was left out"])]
    return "\n\n".join(parts) + "\n"


def write(results: Results, path: Path) -> list[Path]:
    """JSON, Markdown and, with matplotlib, the plot; returns what was written."""

    def draw(picture: Path) -> None:
        from . import plot

        plot.draw(results, picture)

    return output.write(results, markdown(results), path, draw)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="default: all")
    parser.add_argument("--no-peers", action="store_true", help="no other library than ggml")
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON")
    args = parser.parse_args()
    if args.source:
        results, path = Results.from_json(json.loads(args.source.read_text(encoding="utf-8"))), args.source
    else:
        from isqtorch import formats, get_format

        from . import host

        names = args.formats or (QUICK if args.quick else formats())
        try:
            names = [get_format(name).name for name in names]
            results = measure(names, quick=args.quick, peers=not args.no_peers)
        except (Unavailable, ValueError) as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
        path = output.dated(args.output, host.slug())
    paths = write(results, path)
    print(targets_table(judge(results, results.facts["pace"])))
    return output.tell(paths)


if __name__ == "__main__":
    sys.exit(main())
