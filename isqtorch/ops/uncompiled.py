"""The operators where no extension is compiled: on a Mac without a compiler, plain PyTorch computes on the CPU, and Metal kernels
need no compiler of ours.

Their schemas are read from csrc/ops.cpp, which is their only definition; it is installed with the package.
"""

from __future__ import annotations

import re

import torch

from .metal.source import folder

_SCHEMA = re.compile(r'm\.def\("(\w+\(.*\) -> .*)"\)')
_ABOUT_THE_EXTENSION = ("cpu_info", "cuda_info", "set_cpu_isa", "allow_fp8_products")


def schemas() -> list[str]:
    """All operators but those that say something of compiled code, "linear(Tensor x, ...) -> Tensor"."""
    found: list[str] = _SCHEMA.findall((folder() / "ops.cpp").read_text(encoding="utf-8"))
    return [schema for schema in found if not schema.startswith(_ABOUT_THE_EXTENSION)]


def define() -> None:
    """Define torch.ops.isqtorch.*, without kernels."""
    for schema in schemas():
        torch.library.define(f"isqtorch::{schema.split('(')[0]}", schema[schema.index("(") :])
