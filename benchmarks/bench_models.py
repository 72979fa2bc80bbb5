"""Whole models, of real shapes with made-up weights and a small real one: what loading takes, how fast they generate, against the
targets and other libraries.

    python -m benchmarks.bench_models                      bf16, four formats and peers: 15 minutes on two cores, 10 GB of memory
    python -m benchmarks.bench_models --quick              small models: to see that it runs
    python -m benchmarks.bench_models --models llama --formats q4k --no-peers
    python -m benchmarks.bench_models --from FILE.json     the tables of a run again, nothing measured

Writes models-<cpu>-<date>.json and .md to benchmarks/results (of small models to build), the checkpoints to build/models.
README.md says how to get the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from . import output
from .models import tables
from .models.results import ModelResults
from .models.targets import judge
from .output import FOLDER, bullets, targets_table
from .tables import misses

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "models"
MODELS = ("llama", "moe", "smollm2")
FORMATS = ("q8_0", "q4k", "afq4", "q4_0")

HOW = """`llama` has the shapes of Llama-3.2-1B, `moe` three layers of Qwen3-30B-A3B with 64 experts and fewer words; their weights are
made up. `smollm2` is SmolLM2-135M-Instruct, decoded from a GGUF file to bf16. Every library and format has a process of its own.
Memory is in MB of 10^6 bytes over that process after its imports: the most while loading, of everything and of what is not a page of
a file, and what stays. Times are wall seconds with all cores; files are in the page cache. Loading, reading the files and quantizing
matrices of the same shapes that are in memory run in turns, and the best of each counts; memory is that of the first load. What was
saved (`save_original_format=False`) is loaded once, by a fresh process. Then all processes of a format generate in turns, with a
cache, one sequence, greedy: prefill is the tokens of the prompt over the time until the first new token, decode is new tokens per
second after it, medians of all rounds; who takes long has one round, and speeds are not judged where other programs took more than a
tenth of the machine. Ours generates after `optimize_`, as `isqtorch run`, `serve` and `bench` do. bf16 takes part in the turns of
every format. Before each round, a loop in C reads memory with as many threads; the share of the bandwidth is the time in which the
weights, keys and values of a token can be read at that speed, over the time of a token. Logits are compared with the bf16 model's
before anything is timed; llama.cpp computes with the very bytes that we saved. mistral.rs and OpenVINO get a text of as many tokens
and give no logits. No variable says how the threads of OpenMP wait: GNU's spin for some milliseconds, then sleep. llama.cpp also runs
with `OMP_WAIT_POLICY=passive`, so that they sleep at once; the setting `poll` of its own threads has no effect in builds with OpenMP.
The overhead of a layer is CPU time on one thread."""


def measure(models: list[str], formats: list[str], *, quick: bool, peers: bool, cache: Path = CACHE) -> ModelResults:
    """Run everything for these models and formats."""
    from . import host
    from .models.checkpoints import REAL
    from .models.session import Session

    began = time.perf_counter()
    cache.mkdir(parents=True, exist_ok=True)
    python = os.environ.get("ISQTORCH_PEERS_PYTHON", sys.executable)
    session = Session(cache, rounds=2 if quick else 3, new=6 if quick else 64, python=python)
    session.overhead(formats)
    for model in models:
        session.model(f"{model}-small" if quick and model not in REAL else model, formats, peers=peers)
    session.close()
    results = session.results
    results.facts |= {"host": host.facts([]), "quick": quick, "command": command(models, formats, quick, peers)}
    results.facts["seconds"] = round(time.perf_counter() - began)
    return results


def command(models: list[str], formats: list[str], quick: bool, peers: bool) -> str:
    """What measures the same again."""
    options = ["--quick"] * quick + ["--no-peers"] * (not peers)
    return " ".join(["python -m benchmarks.bench_models --models", *models, "--formats", *formats, *options])


def markdown(results: ModelResults) -> str:
    """The whole report."""
    facts, targets = results.facts, judge(results)
    versions = [f"{who} {version}" for who, version in facts.get("versions", {}).items() if who != "isqtorch"]
    lines = [
        *facts["host"],
        f"libraries: {', '.join(versions) or 'none'}",
        tables.bandwidth(results),
        tables.noise(results),
        f"{facts['seconds']} s in all",
    ]
    skipped = [f"{what}: {why}" for what, why in results.skipped.items()] or ["nothing was left out"]
    small = ["**Small models: this shows that it runs; the targets are for the large ones.**"] if facts["quick"] else []
    parts = [
        "# Models",
        *small,
        HOW,
        f"    {facts['command']}",
        "## Targets",
        targets_table(targets),
        "### Below target",
        misses(targets),
        "## Machine",
        bullets(lines),
        "## Loading",
        tables.loading_table(results),
        "## Loading what was saved",
        tables.reload_table(results),
        "## Tokens per second",
        tables.speed_table(results),
        "## Overhead of a layer",
        tables.overhead_table(results),
        "## Not measured",
        bullets(skipped),
    ]
    return "\n\n".join(parts) + "\n"


def write(results: ModelResults, path: Path) -> list[Path]:
    """JSON and Markdown; returns what was written."""
    return output.write(results, markdown(results), path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", default=list(FORMATS))
    parser.add_argument("--no-peers", action="store_true", help="no other libraries")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: benchmarks/results; with --quick build")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON")
    args = parser.parse_args()
    if args.source:
        results, path = ModelResults.from_json(json.loads(args.source.read_text(encoding="utf-8"))), args.source
    else:
        from isqtorch import get_format

        from . import host

        try:
            formats = [get_format(name).name for name in args.formats]
        except ValueError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
        results = measure(args.models, formats, quick=args.quick, peers=not args.no_peers)
        folder = args.output or (ROOT / "build" if args.quick else FOLDER)
        path = output.dated(folder, f"models-{host.slug()}")
    paths = write(results, path)
    print(targets_table(judge(results)))
    return output.tell(paths)


if __name__ == "__main__":
    sys.exit(main())
