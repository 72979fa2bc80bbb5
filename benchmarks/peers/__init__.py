"""Other libraries' products of packed weights, each behind the same small interface.

A peer is a module of this package with

    NAME, INSTALL        how it is called here, and what to install
    FORMATS              names of its formats; where we have the same one, our name
    open() -> Peer       raises Unavailable with the reason

Modules import their library in `open` or later, so that a missing one is an answer and not a crash. The report runs every peer in a
process of its own (`process.py`, `worker.py`): one that dies costs its own rows only, and may live in another environment.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
MODULES = ("ggml", "torchao", "bitsandbytes", "mlx")


class Unavailable(Exception):
    """A peer, or one of its formats or paths, cannot run here; the text says why."""


class Product(Protocol):
    """`x @ weight.T` with a packed weight, ready to run again and again."""

    nbytes: int  # of the packed weight that one call reads

    def __call__(self) -> None:
        """One product, with the next copy of the weight."""

    def result(self) -> Array:
        """f32 `[M, N]` of the last call."""


class Peer(Protocol):
    """A library, loaded."""

    version: str

    def paths(self, fmt: str) -> Sequence[str]:
        """Names of the ways to compute a product of that format; the caller tries all and keeps the fastest."""

    def linear(self, fmt: str, path: str, weight: Array, x: Array, *, copies: int, threads: int) -> Product:
        """Pack `weight`, f32 `[N, K]`, `copies` times and prepare the product with `x`, f32 `[M, K]`.

        Raises:
            Unavailable: this path does not take this format or shape.
        """


def module(name: str) -> ModuleType:
    """The peer's module; importing it needs none of the peers."""
    return importlib.import_module(f"{__name__}.{name}")
