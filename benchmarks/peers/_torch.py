"""What the peers that are torch layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import Array


class LayerProduct:
    """Layers that hold copies of one weight, called in turn on x in bf16."""

    def __init__(self, layers: Sequence[Callable[[Any], Any]], x: Array, nbytes: int, threads: int) -> None:
        import torch

        self.nbytes = nbytes
        self._torch, self._layers, self._threads, self._turn = torch, layers, threads, 0
        self._x = torch.from_numpy(x).bfloat16()

    def __call__(self) -> None:
        self._turn = (self._turn + 1) % len(self._layers)
        with self._torch.inference_mode():
            self._y = self._layers[self._turn](self._x)

    def prepare(self) -> None:
        """Called before timed calls: torch has one number of threads for the whole process."""
        self._torch.set_num_threads(self._threads)

    def result(self) -> Array:
        y: Array = self._y.float().numpy()
        return np.ascontiguousarray(y)
