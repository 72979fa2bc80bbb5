"""Compiles Metal source: lint, a check of address spaces and language, and a library that runs on the CPU."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from .. import build
from .compiler_command import compiler_command, version
from .lint import lint
from .translate import Translation, translate

HERE = Path(__file__).resolve().parent
EMULATOR = HERE.parent
X86 = platform.machine() == "x86_64"

INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<(metal_\w+|simd/simd\.h)>[^\n]*", re.MULTILINE)
PREPROCESS = ["-std=c++14", "-E", "-undef", "-nostdinc", "-nostdinc++", "-imacros", str(HERE / "shim" / "macros.h")]
COMMON = ["-x", "c++", f"-I{EMULATOR}", "-fsigned-char", "-Wno-unknown-attributes"]
CHECK = [
    *COMMON,
    *"-std=c++14 -fsyntax-only -Wall -Werror -nostdinc -nostdinc++ -ferror-limit=50".split(),
    "-Wno-duplicate-decl-specifier",  # `constant` brings a second const
]
RUN = [
    *COMMON,
    *"-std=c++20 -O1 -g1 -fPIC -w -fno-exceptions -fno-rtti -fno-strict-aliasing -ffp-contract=off".split(),
    *"-Xclang -ffloat16-excess-precision=none".split(),  # half is rounded by every operation
    "-fdebug-compilation-dir=.",
    "-ftrivial-auto-var-init=pattern",  # what nobody has written is NaN
    *(["-march=x86-64-v3"] if X86 else []),
]
INSTRUMENT = {
    "plain": [
        "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow",
        "-fsanitize-trap=all",
    ],
    "tsan": ["-fsanitize=thread"],
}
CORE = [EMULATOR / f"{name}.cpp" for name in ("fiber", "buffers", "simt", "meetings", "api")] + [HERE / "runtime.cpp"]
CORE_FLAGS = [*"-x c++ -std=c++20 -O2 -g1 -fPIC -ffp-contract=off -Wall -Wextra".split(), f"-I{EMULATOR}"]


class CompileError(SyntaxError):
    """Source that Metal would refuse, or that this compiler does not understand."""


@functools.cache
def _toolchain() -> tuple[list[str], str]:
    """The compiler's command, and a digest of everything but the shader that a library depends on."""
    command = compiler_command()
    if command is None:
        raise FileNotFoundError("no clang++ >= 19: install Debian's clang-19 or PyPI's ziglang, or set ISQTORCH_CLANG")
    digest = hashlib.sha256(subprocess.run([*command, "--version"], capture_output=True).stdout)
    digest.update(repr((command, PREPROCESS, CHECK, RUN, INSTRUMENT, CORE_FLAGS)).encode())
    parts = [*EMULATOR.glob("*.h"), *HERE.glob("*.h"), *HERE.glob("shim/*.h"), *CORE]
    for path in sorted([*parts, *(HERE / f"{name}.py" for name in ("tokens", "translate", "lint"))]):
        digest.update(path.read_bytes())
    return command, digest.hexdigest()


def library(source: str, variant: str = "plain", only: str | None = None, strict: bool = True) -> Path:
    """The path of a shared library with a shader's kernels; compiled unless it is there.

    Args:
        source: Metal source, complete but for Metal's own headers.
        variant: "plain", which traps undefined behaviour, or "tsan", for ThreadSanitizer.
        only: A regular expression: kernels whose names do not contain it are left out.
        strict: Also lint, and check address spaces and language: off for others' shaders.

    Raises:
        CompileError: with what lint or the compiler says.
        FileNotFoundError: without clang++.
    """
    _, tools = _toolchain()
    digest = hashlib.sha256(repr((tools, source, variant, only, strict)).encode()).hexdigest()[:20]
    target = build.BUILD / f"metal-{variant}-{digest}.so"
    if target.exists():
        return target
    translation = checked(source, only) if strict else translated(source, only)[0]
    core = _core(variant)
    temporary = target.with_suffix(f".{os.getpid()}")
    code = translation.to_run()
    # One trap per check, so that its address tells the line.
    apart = ["-fno-sanitize-merge"] if version(*_toolchain()[0]) >= 20 else ["-mllvm", "-ubsan-unique-traps"]
    try:
        done = _clang(
            [*RUN, *INSTRUMENT[variant], *apart, "-shared", "-", "-x", "none", str(core), "-o", str(temporary)], code
        )
        if done.returncode:
            raise CompileError(done.stderr)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def translated(source: str, only: str | None = None) -> tuple[Translation, str]:
    """A source in C++, and preprocessed."""
    done = _clang([*PREPROCESS, "-x", "c++", "-"], '#line 1 "shader"\n' + INCLUDE.sub("", source))
    if done.returncode:
        raise CompileError(done.stderr)
    try:
        return translate(done.stdout, only), done.stdout
    except SyntaxError as error:
        raise CompileError(f"{error} (the emulator's translator; see tests/emulator/README.md)") from error


def checked(source: str, only: str | None = None) -> Translation:
    """The translation of a source that lint and the check pass have nothing against."""
    translation, preprocessed = translated(source, only)
    complaints = lint(preprocessed)
    if complaints:
        raise CompileError("\n".join(complaints))
    done = _clang([*CHECK, "-"], translation.to_check())
    if done.returncode:
        raise CompileError(done.stderr)
    return translation


def _clang(arguments: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_toolchain()[0], *arguments], input=stdin, capture_output=True, text=True)


@functools.cache
def _core(variant: str) -> Path:
    """The emulator itself, one library for all shaders."""
    command, tools = _toolchain()
    target = build.BUILD / f"metal-core-{variant}-{tools[:20]}.so"
    if not target.exists():
        build.BUILD.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        flags = [*CORE_FLAGS, *build.DEFINES[variant]]
        done = subprocess.run(
            [*command, *flags, "-shared", *map(str, CORE), "-o", str(temporary), "-lpthread", "-ldl"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        temporary.replace(target)
    return target


def sanitized(command: list[str]) -> tuple[list[str], dict[str, str]] | None:
    """A command and its environment for a program that loads "tsan" libraries; None where that cannot be done."""
    name = f"libclang_rt.tsan-{platform.machine()}.so"
    found = subprocess.run(
        [*_toolchain()[0], f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute() or not shutil.which("setarch"):
        return None
    options = "report_signal_unsafe=0:exitcode=66:halt_on_error=0"
    return ["setarch", "-R", *command], {**os.environ, "LD_PRELOAD": found, "TSAN_OPTIONS": options}
