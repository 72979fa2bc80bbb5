"""Measure the Metal kernels on a Mac and write what came out.

    python -m benchmarks.bench_ops --device mps                     all formats
    python -m benchmarks.bench_ops --device mps --quick             few formats and shapes: to see that it runs
    python -m benchmarks.bench_ops --device mps --formats afq4 q4k

Writes <chip>-<date>.json and .md to benchmarks/results. Every call has another copy of the weight, together four times what
the chip may cache, as in a model; warm weights would be read faster than memory allows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from isqtorch import formats, get_format
from isqtorch.cli.doctor import machine_facts, versions
from isqtorch.text import markdown_table

from . import output
from .cuda.clock import Call
from .cuda.contenders import MLX, Bf16, Contender, Ours, TinyGemm, Unavailable
from .cuda.session import OURS, Case, Results, Session
from .output import FOLDER, bullets

SHAPES, QUICK_SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)], [(4096, 4096)]
ROWS, QUICK_ROWS = [1, 2, 4, 8, 32, 128, 512], [1, 32]
QUICK = ["afq4", "q4_0", "q4k"]
CACHE = 96 << 20  # the largest system-level cache of these chips
# GB/s that the memory can read, by the name of the chip: Apple's specifications
PEAK = {
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": 546,
}  # fmt: skip


class WallClock:
    """Times rounds of all calls, from the first to the end of the last.

    Args:
        rounds: of which the median counts.
    """

    def __init__(self, rounds: int = 15) -> None:
        self._rounds = rounds

    def seconds(self, calls: Sequence[Call]) -> float:
        def lap() -> float:
            began = time.perf_counter()
            for call in calls:
                call()
            torch.mps.synchronize()
            return (time.perf_counter() - began) / len(calls)

        lap()
        return statistics.median(lap() for _ in range(self._rounds))


def chip() -> str:
    """The chip's name, "M3 Max"; "" if torch does not know it."""
    get_name = getattr(torch.backends.mps, "get_name", None)
    return str(get_name()).removeprefix("Apple ") if get_name else ""


def measure(session: Session, names: Sequence[str], *, quick: bool) -> Results:
    """Everything, on the session's device."""
    began = time.monotonic()
    results = session.results
    results.facts |= {"gpu": chip() or "Apple GPU", "host": list(machine_facts()), "versions": versions()}
    results.facts["peak"] = PEAK.get(chip())
    with torch.inference_mode():
        session.bandwidth()
        contenders: list[Contender] = [Bf16(), Ours(names)]
        for peer in (TinyGemm, MLX):
            try:
                contenders.append(peer())
            except (ImportError, Unavailable) as reason:
                results.skipped.append(f"{peer.name}: {reason}")
        for shape in QUICK_SHAPES if quick else SHAPES:
            session.products(contenders, shape, QUICK_ROWS if quick else ROWS)
        session.quantize(names, QUICK_SHAPES[0])
    results.facts["seconds"] = round(time.monotonic() - began)
    return results


def markdown(results: Results) -> str:
    """The report."""
    facts = results.facts
    roof = facts["peak"] and f"{facts['peak']} GB/s by specification, "
    machine = [
        facts["gpu"],
        *facts["host"],
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    ]
    machine.append(
        f"memory: {roof or ''}read {facts['read'] / 1e9:.0f} GB/s and copied {facts['copy'] / 1e9:.0f} GB/s here"
    )
    machine.append(f"{facts['seconds']} s in all")
    parts = [f"# {facts['gpu']}", bullets(machine)]
    parts += ["## Faults", bullets(results.faults)] if results.faults else []
    products = [case for case in results.cases if case.m]
    for shape in dict.fromkeys((case.n, case.k) for case in products):
        mine = [case for case in products if (case.n, case.k) == shape]
        rows_of_x = sorted({case.m for case in mine})
        table = []
        for who, format in dict.fromkeys((case.who, case.format) for case in mine):
            cases = [results.find(who, format, shape, m) for m in rows_of_x]
            table.append(
                [who, format, _rate(cases[0], facts), *(f"{1e6 * c.seconds:.0f}" if c else "-" for c in cases)]
            )
        headers = ["who", "format", f"M={rows_of_x[0]}: GB/s packed, of the peak", *(f"M={m}" for m in rows_of_x)]
        parts += [
            f"## {shape[0]} x {shape[1]}, microseconds",
            markdown_table(headers, table, right=range(2, len(headers))),
        ]
    quantized = [[case.format, f"{1e3 * case.seconds:.1f}"] for case in results.cases if not case.m]
    parts += ["## Quantizing from bf16, milliseconds", markdown_table(["format", "ms"], quantized, right=[1])]
    parts += ["## Not measured", bullets(results.skipped or ["nothing was left out"])]
    return "\n\n".join(parts) + "\n"


def _rate(case: Case | None, facts: dict[str, float | None]) -> str:
    if case is None:
        return "-"
    peak = 1e9 * facts["peak"] if facts["peak"] else facts["read"]
    assert peak
    return f"{case.rate / 1e9:.0f}, {case.rate / peak:.0%}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=600, help="begin nothing new after so many (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER")
    args = parser.parse_args(arguments)
    try:
        names = [get_format(name).name for name in args.formats or (QUICK if args.quick else formats())]
    except ValueError as error:
        parser.error(str(error))
    if not torch.backends.mps.is_available():
        print("benchmarks: torch sees no MPS device here", file=sys.stderr)
        return 1
    clock = WallClock(rounds=5 if args.quick else 15)
    session = Session("mps", clock, clock, cache=CACHE, deadline=time.monotonic() + args.seconds)
    results = measure(session, names, quick=args.quick)
    path = output.dated(args.output, output.slug(f"apple {results.facts['gpu']}"))
    paths = output.write(results, markdown(results), path)
    best = [case for case in results.cases if case.who == OURS and case.m == 1]
    print("\n".join(f"{case.format} {case.n} x {case.k}: {_rate(case, results.facts)}" for case in best))
    return output.tell(paths, results.faults)
