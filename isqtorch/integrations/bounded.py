"""Bounds for the model of a configuration that comes from outside: a small file must not make a huge model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_MOST_PARAMETERS = 1 << 17  # twice as many as a model has with 60 layers of 384 experts, each a module of its own
_SPARE = 1 << 24  # elements of buffers that a small model may have: masks and tables of positions


_making = threading.local()  # `count`: parameters of the model that this thread makes; missing: it makes none
_one_at_a_time = threading.RLock()  # transformers sets the default type of torch, for all threads


@contextmanager
def parameters_on_meta(where: str) -> Iterator[None]:
    """Make modules in this thread whose parameters are on the meta device, and whose buffers are real.

    `init_empty_weights` of accelerate patches a class of torch. So layers that other threads make meanwhile have no
    values, and after two overlapping calls no layer of the process ever has again.

    Args:
        where: the file or folder, for messages.

    Raises:
        ValueError: there are more parameters than any real model has.
    """
    _install()
    with _one_at_a_time:
        _making.count, _making.where = 0, where
        try:
            yield
        finally:
            del _making.count


@cache
def _install() -> None:
    """Install the hook, which is never removed: another thread may just be calling it."""
    register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]  # torch means that it may return one


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if not hasattr(_making, "count") or parameter is None:
        return None
    _making.count += 1
    if _making.count > _MOST_PARAMETERS:
        raise ValueError(f"{_making.where}: its configuration makes a model of more than {_MOST_PARAMETERS} parameters")
    if parameter.device.type == "meta":
        return None  # it may be shared, so it has to stay the same object
    empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty


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
