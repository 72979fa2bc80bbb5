"""Exchange layers of a model while other threads run it: each call uses either all old layers or all new ones.

A forward takes no lock and has no overhead. Only during an exchange, a global hook holds back calls that begin, and the
stacks of the other threads show which calls had begun before. When the last of those has returned, all layers are
exchanged in one step that neither a signal nor another thread can interrupt. Then the calls that waited go on.

It relies on two details: calls of modules are frames of `nn.Module._wrapped_call_impl` with a local variable `self`,
and CPython has `sys._current_frames`. It breaks if either changes; test_a_thousand_forwards_during_four_swaps notices.
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

PATIENCE = 600.0  # longest wait in seconds for running calls to return
_POLL = 0.0005
_CALL = "_wrapped_call_impl"  # nn.Module.__call__; compared by name, because Dynamo runs a copy of its code


class Swap(NamedTuple):
    """One replacement: `new` in the place of `old`, which is the child `name` of `parent`."""

    parent: nn.Module
    name: str
    old: nn.Module
    new: nn.Module


def exchange(model: nn.Module, swaps: Sequence[Swap], after: Callable[[], None], undo: Callable[[], None]) -> None:
    """Put all new layers in place at once, while no other thread is inside a call of the model or of a part of it.

    Args:
        model: the model.
        swaps: the replacements.
        after: called after the exchange, before any waiting call goes on.
        undo: called if `after` raises, to reverse what it did.

    Raises:
        RuntimeError: another thread replaced one of the layers, or calls did not return within `PATIENCE` seconds.
            Nothing is exchanged then.
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
    """Put the new layers in place. The loop runs in C only, so no signal handler or other thread can run in between."""
    layers = [swap.parent._modules for swap in swaps]
    names, new = [swap.name for swap in swaps], [swap.new for swap in swaps]
    deque(map(dict.__setitem__, layers, names, new), maxlen=0)


def check_outside(model: nn.Module) -> None:
    """ValueError if a forward of the model is the caller: the exchange would wait for it forever."""
    if _calls(sys._getframe(), _ids(model)):
        raise ValueError("requantize_: was called from inside a forward of this model. Call it outside.")


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread is inside a call of the model, and hold back calls that begin meanwhile."""
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
    """Number of calls on a stack of modules whose ids are in `inside`."""
    count = 0
    while frame is not None:
        if frame.f_code.co_name == _CALL and id(frame.f_locals.get("self")) in inside:
            count += 1
        frame = frame.f_back
    return count


def _ids(model: nn.Module) -> set[int]:
    return {id(module) for module in model.modules()}


def _synchronize(swaps: Sequence[Swap]) -> None:
    """Wait for accelerators: kernels may still read the old weights for finished calls, or write the new weights."""
    devices = {parameter.device for swap in swaps for parameter in swap.new.parameters(recurse=False)}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
