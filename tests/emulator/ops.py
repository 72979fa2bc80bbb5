"""The operators of csrc/cuda in the emulator, as `torch.ops.isqtorch_emulated`: CPU tensors stand in for CUDA's."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from csrc.cuda.build import operators, units

from . import build

_CSRC = build.ROOT / "csrc"
_FLAGS = [
    "-DISQTORCH_EMULATED",
    "-DISQTORCH_OPERATORS=isqtorch_emulated",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    *(flag for path in include_paths() for flag in ("-isystem", path)),
]


@cache
def emulated() -> Any:
    """The namespace with the operators; compiled and loaded once."""
    folders = library_paths()
    path = build.library(
        "ops",
        units(),
        flags=("-O1",),  # as in kernels.py, so that the objects are the same
        host=[_CSRC / "ops.cpp", *operators()],
        host_flags=tuple(_FLAGS),
        link=(*(f"-L{Path(folder)}" for folder in folders), "-ltorch_cpu", "-lc10"),
    )
    torch.ops.load_library(str(path))
    return torch.ops.isqtorch_emulated
