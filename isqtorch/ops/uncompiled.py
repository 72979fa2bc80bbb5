"""The operators without a compiled extension: on a Mac that has no compiler, and on Windows.

Plain PyTorch computes on the CPU; the Metal kernels are compiled by torch. The schemas are read from csrc/ops.cpp,
which is their only definition and is installed with the package.
"""

from __future__ import annotations

import re

import torch

from .metal.source import folder

_SCHEMA = re.compile(r'm\.def\(\s*"(\w+\(.*\) -> .*)"\)')
_BROKEN = re.compile(r'"\s*\n\s*"')  # one string in several lines
_ABOUT_THE_EXTENSION = ("cpu_info", "cuda_info", "set_cpu_isa", "allow_fp8_products")


def schemas() -> list[str]:
    """Return the schemas ("linear(Tensor x, ...) -> Tensor") of all operators except those about compiled code."""
    found: list[str] = _SCHEMA.findall(_BROKEN.sub("", (folder() / "ops.cpp").read_text(encoding="utf-8")))
    return [schema for schema in found if not schema.startswith(_ABOUT_THE_EXTENSION)]


def define() -> None:
    """Define torch.ops.isqtorch.* without kernels."""
    for schema in schemas():
        torch.library.define(f"isqtorch::{schema.split('(')[0]}", schema[schema.index("(") :])
