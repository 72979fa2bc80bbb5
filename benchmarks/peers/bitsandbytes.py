"""bitsandbytes' NF4 layer with bf16 computation."""

from __future__ import annotations

from typing import Any

from . import Array, Unavailable
from ._torch import LayerProduct

NAME = "bitsandbytes"
INSTALL = "pip install bitsandbytes"
FORMATS = ("nf4",)
_BLOCK = 64  # weights per f32 scale


class BitsAndBytes:
    def __init__(self) -> None:
        try:
            import bitsandbytes
        except ImportError as error:
            raise Unavailable(f"not installed: {INSTALL}") from error
        self.version: str = bitsandbytes.__version__

    def paths(self, fmt: str) -> list[str]:
        return ["Linear4bit"]

    def linear(self, fmt: str, path: str, weight: Array, x: Array, *, copies: int, threads: int) -> LayerProduct:
        import torch
        from bitsandbytes.nn import Linear4bit, Params4bit

        def build() -> Any:
            layer = Linear4bit(
                weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type=fmt
            )
            values = torch.from_numpy(weight).bfloat16()
            layer.weight = Params4bit(values, requires_grad=False, quant_type=fmt, blocksize=_BLOCK)
            layer.to("cpu")  # quantizes
            return layer

        nbytes = weight.size // 2 + 4 * weight.size // _BLOCK
        return LayerProduct([build() for _ in range(copies)], x, nbytes, threads)


def open() -> BitsAndBytes:
    """Load the library."""
    return BitsAndBytes()
