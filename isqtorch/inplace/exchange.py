"""Exchanging layers of a model while other threads run it: every call of the model computes with all of the old or all of the new.

A forward holds no lock and pays nothing for this. Only while layers are exchanged, a hook holds back calls that begin, and the
stacks of the other threads show which began before that. When the last of those is done, one step of the interpreter that
nothing can interrupt exchanges the layers, and the calls that waited go on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

PATIENCE = 600.0  # seconds that calls may take to come to an end
_POLL = 0.0005
_CALL = "_wrapped_call_impl"  # nn.Module.__call__; by name, because Dynamo runs a copy of its code


class Swap(NamedTuple):
    """A layer in the place of another."""

    parent: nn.Module
    name: str
    old: nn.Module
    new: nn.Module


def exchange(model: nn.Module, swaps: Sequence[Swap], after: Callable[[], None], undo: Callable[[], None]) -> None:
    """Put all new layers in place at once, when no other thread is inside a call of the model or of a part of it.

    Args:
        model: the model.
        swaps: what goes where.
        after: what belongs to the exchange; calls wait for it.
        undo: takes back what `after` did, if that fails.

    Raises:
        RuntimeError: another thread has changed the layers meanwhile; calls do not end within `PATIENCE` seconds. Nothing is
            exchanged then.
    """
    with _alone(model):
        moved = [swap for swap in swaps if swap.parent._modules.get(swap.name) is not swap.old]
        if moved:
            raise RuntimeError(
                f"requantize_: layer {moved[0].name!r} was replaced by other code meanwhile. Nothing was changed."
            )
        _synchronize(swaps)
        try:
            _put(swaps)
            after()
        except BaseException:
            _put([Swap(swap.parent, swap.name, swap.new, swap.old) for swap in swaps])
            undo()
            raise


def _put(swaps: Sequence[Swap]) -> None:
    """The new layers in place. No signal and no other thread comes in between: a loop in C, in which no Python code runs."""
    layers = [swap.parent._modules for swap in swaps]
    names, new = [swap.name for swap in swaps], [swap.new for swap in swaps]
    deque(map(dict.__setitem__, layers, names, new), maxlen=0)


def check_outside(model: nn.Module) -> None:
    """ValueError if the caller is called by a forward of the model, which could never end."""
    if _calls(sys._getframe(), _ids(model)):
        raise ValueError("requantize_: was called from inside a forward of this model. Call it outside.")


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """No call of the model runs in another thread, and those that begin wait."""
    inside, own, opened = _ids(model), threading.get_ident(), threading.Event()

    def gate(module: nn.Module, args: Any) -> None:
        if id(module) in inside and threading.get_ident() != own and _calls(sys._getframe(), inside) == 1:
            opened.wait()

    def waits(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code is gate.__code__ and frame.f_locals.get("opened") is opened:
                return True
            frame = frame.f_back
        return False

    def runs(frame: FrameType) -> bool:
        return _calls(frame, inside) > 0 and not waits(frame)

    opened.set()  # an interrupt before `try` must not leave a closed gate behind
    hook = register_module_forward_pre_hook(gate)
    try:
        opened.clear()
        deadline = time.monotonic() + PATIENCE
        while any(runs(frame) for thread, frame in sys._current_frames().items() if thread != own):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"requantize_: other threads are inside a forward of the model for {PATIENCE:.0f} s now. Nothing was changed."
                )
            time.sleep(_POLL)
        yield
    finally:
        opened.set()
        hook.remove()


def _calls(frame: FrameType | None, inside: set[int]) -> int:
    """How many calls of modules of the model are on a stack."""
    count = 0
    while frame is not None:
        if frame.f_code.co_name == _CALL and id(frame.f_locals.get("self")) in inside:
            count += 1
        frame = frame.f_back
    return count


def _ids(model: nn.Module) -> set[int]:
    return {id(module) for module in model.modules()}


def _synchronize(swaps: Sequence[Swap]) -> None:
    """Wait for accelerators: kernels of calls that returned still read the old weights, and others write the new ones."""
    devices = {parameter.device for swap in swaps for parameter in swap.new.parameters(recurse=False)}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
