"""isqtorch itself, for comparisons at an older instruction set: what torch computes for us is kept to it too, which works only from
the start of a process."""

from __future__ import annotations

from functools import partial
from typing import Any

from . import Array
from ._torch import LayerProduct

NAME = "isqtorch"
INSTALL = "make build"
FORMATS = ()  # all of the registry; asked for by name

ENVIRONMENT = {
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""By tier. Our own level is set by ISQTORCH_CPU_ISA beside these."""


class Ourselves:
    def __init__(self) -> None:
        import isqtorch

        self.version: str = isqtorch.__version__

    def paths(self, fmt: str) -> list[str]:
        from isqtorch import ops

        return [ops.cpu_info().isa_selected]

    def linear(self, fmt: str, path: str, weight: Array, x: Array, *, copies: int, threads: int) -> LayerProduct:
        import torch

        from isqtorch import ops

        packed = ops.quantize(torch.from_numpy(weight), fmt)
        layers = [partial(_linear, weight=packed.clone(), fmt=fmt) for _ in range(copies)]
        return LayerProduct(layers, x, packed.nbytes, threads)


def _linear(x: Any, *, weight: Any, fmt: str) -> Any:
    from isqtorch import ops

    return ops.linear(x, weight, fmt)


def open() -> Ourselves:
    """Load the library."""
    return Ourselves()
