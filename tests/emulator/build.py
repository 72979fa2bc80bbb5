"""Builds the emulator with GPU sources into a library, as an ordinary or a sanitizer build.

Only the GPU sources are instrumented: the emulator's own bookkeeping is shared by all fibers on purpose. Objects are
kept by the content of everything that went into them, so a change compiles again what it touches and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from csrc.cuda.build import Unit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulator"
COMPILER = os.environ.get("CXX", "g++")

CORE = [HERE / f"{name}.cpp" for name in ("fiber", "buffers", "simt", "meetings", "tensor_core", "api")]
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


def library(
    name: str,
    sources: Sequence[Path | Unit],
    variant: str = "plain",
    flags: tuple[str, ...] = (),
    *,
    host: list[Path] | None = None,
    host_flags: tuple[str, ...] = (),
    link: tuple[str, ...] = (),
) -> Path:
    """The path of a shared library with the emulator and `sources`; what it needs is compiled unless it is there.

    Args:
        name: of the library.
        sources: GPU code, which is instrumented.
        variant: plain, asan or tsan.
        flags: for `sources`.
        host: code that calls it and is no GPU's.
        host_flags: for `host`.
        link: more for the linker.
    """
    (BUILD / "objects").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        core = pool.map(lambda path: _object(path, [*CORE_FLAGS, *DEFINES[variant]]), CORE)
        units = [source if isinstance(source, Unit) else Unit(source) for source in sources]
        seen = [*DEFINES[variant], *INSTRUMENT[variant], *flags]
        gpu = pool.map(lambda unit: _object(unit.source, [*seen, *unit.defines]), units)
        rest = pool.map(lambda path: _object(path, list(host_flags)), host or [])
        objects = [*core, *gpu, *rest]
    digest = _digest([*(path.name for path in objects), *link])
    target = BUILD / f"{name}-{variant}-{digest}.so"
    if not target.exists():
        linked = target.with_suffix(f".{os.getpid()}.so")
        complete = ["-Wl,-z,defs"] if variant == "plain" else []  # a runtime is only there when the program runs
        flags_of_link = ["-shared", *complete, *INSTRUMENT[variant]]
        _run([COMPILER, *flags_of_link, *map(str, objects), "-o", str(linked), *link, "-lpthread", "-ldl"])
        linked.replace(target)
    return target


def _object(source: Path, flags: list[str]) -> Path:
    """The object of a source. Its name has the content of the files that went into it, which the compiler lists."""
    flags = [*FLAGS, *flags]
    start = BUILD / "objects" / f"{source.stem}-{_digest([COMPILER, str(source), *flags])}"
    listed = start.with_suffix(".d")
    if listed.exists() and (found := _named(start, listed)).exists():
        return found
    made, inputs = start.with_suffix(f".{os.getpid()}.o"), start.with_suffix(f".{os.getpid()}.d")
    _run([COMPILER, *flags, "-MMD", "-MF", str(inputs), "-x", "c++", "-c", str(source), "-o", str(made)])
    inputs.replace(listed)
    target = _named(start, listed)
    made.replace(target)
    return target


def _named(start: Path, listed: Path) -> Path:
    inputs = [Path(word) for word in listed.read_text().split(":", 1)[1].replace("\\\n", " ").split()]
    return start.with_name(f"{start.name}-{_digest([p.read_text() if p.exists() else '' for p in inputs])}.o")


def _digest(texts: list[str]) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:12]


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # see `sanitized`
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
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
            "TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66:ignore_noninstrumented_modules=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    if variant == "tsan":
        command = ["setarch", "-R", *command]  # ThreadSanitizer wants its memory where it is without randomization
    return command, environment


def _runtime(name: str) -> str:
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()
