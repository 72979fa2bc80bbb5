"""Bounds for the model of a configuration that comes from outside: a small file must not make a huge model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_MOST_PARAMETERS = 1 << 17  # twice as many as a model has with 60 layers of 384 experts, each a module of its own
_SPARE = 1 << 24  # elements of buffers that a small model may have: masks and tables of positions


@contextmanager
def few_parameters(where: str) -> Iterator[None]:
    """Stop this thread from making a model of more parameters than any real one has.

    Args:
        where: the file or folder, for messages.

    Raises:
        ValueError: there are too many.
    """
    own, count = threading.get_ident(), 0

    def count_one(module: nn.Module, name: str, parameter: object) -> None:
        nonlocal count
        if threading.get_ident() != own:
            return
        count += 1
        if count > _MOST_PARAMETERS:
            raise ValueError(f"{where}: its configuration makes a model of more than {_MOST_PARAMETERS} parameters")

    hook = register_module_parameter_registration_hook(count_one)
    try:
        yield
    finally:
        hook.remove()


def check_size(model: Any, elements: int, where: str) -> None:
    """Compare a model on the meta device with the files that are to fill it.

    Args:
        model: the model. Its buffers are on the meta device, too.
        elements: how many numbers the files have, packed or not.
        where: the file or folder, for messages.

    Raises:
        ValueError: the model is several times larger than the files.
    """
    for tensors, room, what in ((model.parameters(), 4 * elements, "weights"), (model.buffers(), elements, "buffers")):
        found: list[Tensor] = list(tensors)
        size = sum(tensor.numel() for tensor in found)
        if size > room + _SPARE:
            raise ValueError(
                f"{where}: its configuration makes a model with {size} numbers in its {what}, and the files have {elements} numbers. "
                "The configuration is damaged, or of another model."
            )
