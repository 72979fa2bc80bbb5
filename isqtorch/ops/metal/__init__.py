"""Kernels for Apple's GPUs: csrc/metal, compiled by torch when they are first used."""

from __future__ import annotations

import torch

from isqtorch.formats import formats

from .library import TYPES, compile_all

__all__ = ["check"]


def check() -> list[str]:
    """Compile every Metal library once, which takes minutes, and report what the compiler refuses.

    Returns:
        A line per format and type that does not compile: empty if all is well.

    Raises:
        RuntimeError: there is no MPS device here.
    """
    if not torch.backends.mps.is_available():
        raise RuntimeError("isqtorch.metal.check: this machine has no MPS device")
    faults = []
    for name in formats(variants=True):
        for dtype in TYPES:
            try:
                compile_all(name, dtype)
            except RuntimeError as error:
                faults.append(str(error))
    return faults
