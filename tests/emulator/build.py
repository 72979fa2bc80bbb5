"""Builds the emulator with GPU sources into a library, as an ordinary or a sanitizer build.

Only the GPU sources are instrumented: the emulator's own bookkeeping is shared by all fibers on purpose.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulator"
COMPILER = os.environ.get("CXX", "g++")

CORE = [HERE / f"{name}.cpp" for name in ("fiber", "buffers", "simt", "tensor_core", "api")]
FLAGS = [
    *"-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror".split(),
    "-Wno-unknown-pragmas",  # nvcc's, about unrolling
    f"-I{ROOT / 'csrc'}",
    f"-I{HERE}",
]
# A loop that copies words must stay one: ThreadSanitizer watches memcpy even in code that it does not instrument.
CORE_FLAGS = ["-fno-tree-loop-distribute-patterns"]
DEFINES = {"plain": [], "asan": ["-DEMULATOR_ASAN"], "tsan": ["-DEMULATOR_TSAN"]}
INSTRUMENT = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread"],
}


def library(name: str, sources: list[Path], variant: str = "plain", flags: tuple[str, ...] = ()) -> Path:
    """The path of a shared library with the emulator and `sources`; compiled unless one of the same content is there."""
    headers = [*HERE.glob("*.h"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    digest = hashlib.sha256(repr((COMPILER, FLAGS, CORE_FLAGS, INSTRUMENT, flags)).encode())
    for path in sorted([*headers, *CORE, *sources]):
        digest.update(path.read_bytes())
    target = BUILD / f"{name}-{variant}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder = BUILD / f"{name}-{variant}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            core = pool.map(lambda path: _compile(path, folder, [*CORE_FLAGS, *DEFINES[variant]]), CORE)
            gpu = pool.map(
                lambda path: _compile(path, folder, [*DEFINES[variant], *INSTRUMENT[variant], *flags]), sources
            )
            objects = [str(path) for path in [*core, *gpu]]
        linked = folder / target.name
        _run([COMPILER, "-shared", *INSTRUMENT[variant], *objects, "-o", str(linked), "-lpthread", "-ldl"])
        linked.replace(target)
    finally:
        shutil.rmtree(folder)
    return target


def _compile(source: Path, folder: Path, flags: list[str]) -> Path:
    target = folder / f"{source.stem}.{hashlib.sha256(str(source).encode()).hexdigest()[:8]}.o"
    _run([COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def sanitized(variant: str, command: list[str]) -> tuple[list[str], dict[str, str]]:
    """A command and its environment for a program that loads a library of `variant`: the runtime must come first."""
    runtimes = {"plain": [], "asan": ["libasan.so", "libubsan.so"], "tsan": ["libtsan.so"]}[variant]
    environment = dict(os.environ)
    if runtimes:
        paths = [_runtime(name) for name in [*runtimes, "libstdc++.so.6"]]
        environment |= {
            "LD_PRELOAD": " ".join(paths),
            # the emulator handles faults itself; what Python leaves allocated is not our leak
            "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_sigfpe=0:handle_sigill=0:use_sigaltstack=0",
            "TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    if variant == "tsan":
        command = ["setarch", "-R", *command]  # ThreadSanitizer wants its memory where it is without randomization
    return command, environment


def _runtime(name: str) -> str:
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()
