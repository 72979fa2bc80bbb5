"""The targets. `SHARES` says how the inputs are divided among them: the cheaper, the more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from random import Random
from typing import Any

SHARES = {
    "topology": 15,
    "imatrix": 15,
    "gguf": 15,
    "gguf_model": 4,
    "safetensors": 10,
    "index": 4,
    "config": 15,
    "mlx": 4,
    "metadata": 8,
    "report": 3,
    "sizes": 10,
    "cli": 3,
    "operators": 12,
}

SLOW = {"operators": 10.0}
"""Targets whose inputs may take more seconds of processor time than `driver.HANG`: plain torch searches 100,000 weights."""


@dataclass(frozen=True)
class Target:
    """One reader or group of operators.

    Attributes:
        make: makes an input from a seeded generator. The input must have a readable `repr`.
        run: runs the code under test. True: the input was accepted; False: it was refused in another way than by an
            exception.
        promised: the only exceptions that may leave `run`.
    """

    make: Callable[[Random], Any]
    run: Callable[[Any], bool | None]
    promised: tuple[type[BaseException], ...] = (ValueError, OSError)


def load(name: str) -> Target:
    """Return the target of a module of this package, or of any module by its full name."""
    found: Target = import_module(name if "." in name else f"fuzz.targets.{name}").TARGET
    return found
