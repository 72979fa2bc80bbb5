"""What tests of the Metal emulator share: the shaders that test it, and launches of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from emulator.metal import compiler, races, runner

FOLDER = Path(__file__).resolve().parent / "emulator" / "metal"
needs_compiler = pytest.mark.skipif(
    compiler.compiler_command() is None,
    reason="Metal shaders are not tested: no clang++ >= 19 (Debian's clang-19, PyPI's ziglang, or ISQTORCH_CLANG)",
)
needs_tsan = pytest.mark.skipif(
    compiler.compiler_command() is not None and not races.available(), reason="no ThreadSanitizer for this clang++"
)


@cache
def selftest() -> runner.Library:
    return runner.compile_shader((FOLDER / "selftest.metal").read_text())


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def numbers(count: int) -> torch.Tensor:
    return torch.tensor([((i * 7 % 31) - 15) / 4 for i in range(count)])


def group_sum(library: runner.Library, variant: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    x, y = numbers(768), nan(3)
    getattr(library, f"group_sum{variant}")(x, y, threads=768, group_size=256)
    return y, x.reshape(3, 256).sum(1)
