"""Finds clang++ for Metal shaders; as a script, prints its command, or fails."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys


@functools.cache
def compiler_command() -> list[str] | None:
    """clang++: what ISQTORCH_CLANG says, Debian's, or the one in PyPI's ziglang; None where there is none, or no Linux."""
    if platform.system() != "Linux":
        return None  # the emulator itself is written for Linux
    named = os.environ.get("ISQTORCH_CLANG")
    if named:
        return named.split()
    for name in ("clang++-19", "clang++-20", "clang++-21", "clang++-22", "clang++"):
        if shutil.which(name) and version(name) >= 19:
            return [name]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


@functools.cache
def version(*command: str) -> int:
    """The clang version of a command; 0 if it is none."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"clang version (\d+)", said)
    return int(match[1]) if match else 0


if __name__ == "__main__":
    print(" ".join(compiler_command() or sys.exit("no clang++ >= 19, or not Linux")))
