"""Choices that a model makes with `topk`, such as those of routers, held fast between two calls.

With random weights, experts are often chosen by a hair. A little noise then changes the choice, and the outputs with it,
which says nothing about the products. So the second call takes what the first one chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Choices:
    """What was chosen in a call, in order."""

    def __init__(self) -> None:
        self._made: list[Tensor] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the choices that are made in this block."""
        self._made.clear()
        topk = torch.topk

        def noting(*args: Any, **options: Any) -> Any:
            found = topk(*args, **options)
            self._made.append(found.indices)
            return found

        with _patched(noting):
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Make the noted choices in this block, as long as they have the same shape."""
        topk, coming = torch.topk, iter(self._made)

        def repeating(*args: Any, **options: Any) -> Any:
            found, indices = topk(*args, **options), next(coming, None)
            if indices is None or indices.shape != found.indices.shape:
                return found
            dim = options.get("dim", args[2] if len(args) > 2 else -1)
            values = args[0].gather(dim, indices) if args else options["input"].gather(dim, indices)
            return torch.return_types.topk((values, indices))

        with _patched(repeating):
            yield


@contextmanager
def _patched(function: Any) -> Iterator[None]:
    both = torch.topk, Tensor.topk
    torch.topk, Tensor.topk = function, lambda *args, **options: function(*args, **options)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.topk, Tensor.topk = both  # type: ignore[method-assign]
