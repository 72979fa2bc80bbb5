"""What a second thread gains for one product, in a cache: a table in Markdown.

    python -m benchmarks.bench_threads            # half a minute; --loaded: while another program takes a core

Each number is the median time (--loaded: the mean) of a product with one row of x, called again and again. Idle threads
of torch spin (the default of GNU OpenMP) or sleep (OMP_WAIT_POLICY=passive); each case runs in a process of its own, in
turns. "of half": the time on two threads divided by half of that on one. 1 cannot be reached, because checking and
packing x are done by one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

import isqtorch  # noqa: F401  (the operators)
from isqtorch.text import markdown_table

SHAPES = [(512, 2048), (2048, 2048), (8192, 2048), (2048, 8192)]
FORMATS = ["q4k", "q8_0"]
CASES = {"1 thread": (1, None), "2 threads, spinning": (2, None), "2 threads, sleeping": (2, "passive")}
ROUNDS = 3


def measure(threads: int, seconds: float, loaded: bool) -> dict[str, float]:
    """Microseconds for each format and shape: the mean on a loaded machine, where some calls take a hundred times as long."""
    middle = statistics.mean if loaded else statistics.median
    torch.set_num_threads(threads)
    linear = torch.ops.isqtorch.linear_frozen.default
    times: dict[str, float] = {}
    for fmt in FORMATS:
        for n, k in SHAPES:
            w, x = torch.ops.isqtorch.quantize(torch.randn(n, k), fmt), torch.randn(1, k)
            taken: list[float] = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                for _ in range(20):
                    linear(x, w, fmt, None)
                taken.append((time.perf_counter() - start) / 20)
            times[f"{fmt} {n} x {k}"] = middle(taken) * 1e6
    return times


def in_a_process(threads: int, policy: str | None, loaded: bool) -> dict[str, float]:
    """The same, measured by a process whose idle OpenMP threads follow a policy."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-m", "benchmarks.bench_threads", "--threads", str(threads), *["--loaded"] * loaded]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    times: dict[str, float] = json.loads(done.stdout)
    return times


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaded", action="store_true", help="while another program takes a core")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads:
        print(json.dumps(measure(options.threads, 0.2, options.loaded)))
        return
    other: Any = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.loaded else None
    try:
        rounds = [{name: in_a_process(*case, options.loaded) for name, case in CASES.items()} for _ in range(ROUNDS)]
    finally:
        if other is not None:
            other.kill()
            other.wait()
    rows = []
    for product in rounds[0]["1 thread"]:
        one, *two = (statistics.median(r[name][product] for r in rounds) for name in CASES)
        rows.append([product, f"{one:.1f}", *(f"{t:.1f} ({2 * t / one:.2f} of half)" for t in two)])
    print(markdown_table(["us", *CASES], rows))


if __name__ == "__main__":
    main()
