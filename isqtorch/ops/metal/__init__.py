"""Kernels for Apple GPUs: the sources in csrc/metal, which torch compiles at first use."""

from __future__ import annotations

import torch

from isqtorch.formats import formats

from .library import TYPES, compile_all

__all__ = ["check"]


def check() -> list[str]:
    """Compile the Metal kernels of every format and float type. This takes minutes and needs a Mac.

    Returns:
        The compiler's message for each format and type that does not compile; empty if all compile.

    Raises:
        RuntimeError: this machine has no MPS device.

    Example:
        if torch.backends.mps.is_available():
            print(isqtorch.metal.check())  # [] if all kernels compile
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
