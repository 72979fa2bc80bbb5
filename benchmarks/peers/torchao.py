"""torchao's weight-only configurations on an nn.Linear: eager, and compiled as torchao recommends (needs a C++ compiler)."""

from __future__ import annotations

from . import Array, Unavailable
from ._torch import LayerProduct

NAME = "torchao"
INSTALL = "pip install torchao"
FORMATS = ("int8", "int4")


def configuration(fmt: str) -> object:
    """torchao's description of one of `FORMATS`."""
    from torchao import quantization

    if fmt == "int8":
        return quantization.Int8WeightOnlyConfig()
    return quantization.Int4WeightOnlyConfig(
        group_size=64, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


class TorchAO:
    def __init__(self) -> None:
        try:
            import torchao
        except ImportError as error:
            raise Unavailable(f"not installed: {INSTALL}") from error
        self.version: str = torchao.__version__

    def paths(self, fmt: str) -> list[str]:
        return ["eager", "compiled"]

    def linear(self, fmt: str, path: str, weight: Array, x: Array, *, copies: int, threads: int) -> LayerProduct:
        import torch
        from torchao import quantization

        def build() -> torch.nn.Module:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
            layer.weight.data.copy_(torch.from_numpy(weight))
            try:
                quantization.quantize_(layer, configuration(fmt))
            except Exception as error:  # the library's word on what it has no kernel for
                raise Unavailable(f"torchao: {' '.join(str(error).split())[:100]}") from error
            layer.requires_grad_(False)
            return torch.compile(layer, dynamic=False) if path == "compiled" else layer  # type: ignore[return-value]

        bits = 8 if fmt == "int8" else 4
        scales = 2 * weight.shape[0] if fmt == "int8" else 4 * weight.size // 64
        return LayerProduct([build() for _ in range(copies)], x, weight.size * bits // 8 + scales, threads)


def open() -> TorchAO:
    """Load the library."""
    return TorchAO()
