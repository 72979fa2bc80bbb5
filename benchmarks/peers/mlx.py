"""MLX's affine quantization on its CPU backend; our afq formats are the same numbers."""

from __future__ import annotations

import numpy as np

from . import Array, Unavailable

NAME = "mlx"
INSTALL = "pip install 'mlx[cpu]'"
FORMATS = ("afq2", "afq3", "afq4", "afq5", "afq6", "afq8")
_GROUP = 64


class _Product:
    def __init__(self, bits: int, weight: Array, x: Array, copies: int) -> None:
        import mlx.core as mx

        self._mx, self._bits, self._turn = mx, bits, 0
        parts = mx.quantize(mx.array(weight).astype(mx.bfloat16), group_size=_GROUP, bits=bits)
        self._copies = [
            tuple(mx.array(np.array(part.view(mx.uint8))).view(part.dtype) for part in parts) for _ in range(copies)
        ]
        self._x = mx.array(x).astype(mx.bfloat16)
        mx.eval(self._copies, self._x)
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self) -> None:
        self._turn = (self._turn + 1) % len(self._copies)
        weight, scales, biases = self._copies[self._turn]
        self._y = self._mx.quantized_matmul(
            self._x, weight, scales, biases, transpose=True, group_size=_GROUP, bits=self._bits
        )
        self._mx.eval(self._y)

    def result(self) -> Array:
        return np.array(self._y.astype(self._mx.float32))


class MLX:
    def __init__(self) -> None:
        try:
            import mlx.core as mx
        except ImportError as error:
            raise Unavailable(f"not installed: {INSTALL}") from error
        self.version: str = mx.__version__
        mx.set_default_device(mx.cpu)

    def paths(self, fmt: str) -> list[str]:
        return ["cpu"]

    def linear(self, fmt: str, path: str, weight: Array, x: Array, *, copies: int, threads: int) -> _Product:
        if threads > 1:
            raise Unavailable("mlx: its CPU products run on one thread")
        return _Product(int(fmt.removeprefix("afq")), weight, x, copies)


def open() -> MLX:
    """Load the library."""
    return MLX()
