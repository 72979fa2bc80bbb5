"""Everything that only a machine with a GPU can show, one step after the other: `make gpu-check`.

    python -m benchmarks.cuda.gpu_check [--quick]

1. the tests marked `cuda`; 2. a few of them under compute-sanitizer, where it is installed; 3. the benchmark, whose report goes to
benchmarks/results. Ends with 1 if a step failed; the benchmark is not run if the tests fail, because a wrong kernel's speed is
worth nothing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

LIMIT = 380.0  # seconds for all of it: with the build, two to three minutes on 16 cores, nine minutes
SANITIZED = "test_doctor_agrees and (q4_0 or q6k or afq3 or fp8) or captures_a_decode_step or (on_a_gpu and 129)"

Run = Callable[[Sequence[str]], int]


def steps(
    quick: bool, remaining: Callable[[], float], find: Callable[[str], str | None]
) -> list[tuple[str, list[str]]]:
    """Names and commands.

    Args:
        quick: a small benchmark.
        remaining: seconds that are left, asked for when the benchmark's command is made.
        find: the path of a program, None if it is not installed.
    """
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "cuda"]
    found = [("tests", [*pytest, "tests/test_cuda_device.py", "tests/test_cuda_ops.py", "tests/test_cuda_fp8.py"])]
    sanitizer = find("compute-sanitizer")
    if sanitizer:
        memcheck = [sanitizer, "--tool=memcheck", "--error-exitcode=9", "--target-processes=all"]
        files = ["tests/test_cuda_device.py", "tests/test_cuda_fp8.py"]
        found.append(("compute-sanitizer", [*memcheck, *pytest, *files, "-k", SANITIZED]))
    bench = [sys.executable, "-m", "benchmarks.bench_ops", "--device", "cuda", f"--seconds={remaining():.0f}"]
    return [*found, ("benchmark", [*bench, *(["--quick"] if quick else [])])]


def run_all(quick: bool, run: Run, find: Callable[[str], str | None] = shutil.which, limit: float = LIMIT) -> int:
    """Run the steps; returns the exit status."""
    began = time.monotonic()
    failed: list[str] = []
    names = [name for name, _ in steps(quick, lambda: limit, find)]
    if "compute-sanitizer" not in names:
        print("== compute-sanitizer is not installed: not run", flush=True)
    for name in names:
        if failed and name == "benchmark":
            print(f"== benchmark: not run, because {' and '.join(failed)} failed", flush=True)
            break
        command = dict(steps(quick, lambda: max(60.0, limit - (time.monotonic() - began)), find))[name]
        print(f"== {name} ({time.monotonic() - began:.0f} s)", flush=True)
        if run(command):
            failed.append(name)
    print(
        f"== {'FAILED: ' + ', '.join(failed) if failed else 'all passed'} ({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    import torch

    from isqtorch.ops.native import CUDA_LIBRARY, NO_CUDA

    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA GPU here", file=sys.stderr)
        return 1
    if CUDA_LIBRARY is None:
        print(f"gpu-check: no CUDA kernels: {NO_CUDA}", file=sys.stderr)
        return 1
    return run_all(args.quick, lambda command: subprocess.run(command).returncode)


if __name__ == "__main__":
    sys.exit(main())
