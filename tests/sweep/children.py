"""Run a function for each of many types, each in a process of its own, with limits of time and memory.

Processes are forked from one that has imported everything, which takes longer than most checks. A crash, an endless
loop or a lack of memory ends one type and not the sweep.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from .building import described
from .checks import Row

Check = Callable[[str, Path], Row]


class Limits(NamedTuple):
    """For one type."""

    seconds: float = 180.0
    gigabytes: float = 6.0


class _Child(NamedTuple):
    kind: str
    process: Any
    answer: Connection
    began: float
    folder: tempfile.TemporaryDirectory[str]


def run(kinds: Sequence[str], check: Check, limits: Limits, jobs: int) -> Iterator[Row]:
    """The row of each type, in the order in which they are done. `jobs` processes run at a time."""
    waiting, running = deque(kinds), list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.popleft(), check, limits))
            soonest = min(child.began for child in running) + limits.seconds
            wait([child.answer for child in running], timeout=max(0.0, soonest - time.monotonic()))
            for child in list(running):
                if child.answer.poll() or time.monotonic() - child.began > limits.seconds:
                    running.remove(child)
                    yield _finish(child, limits)
    finally:
        for child in running:
            child.process.kill()
            _finish(child, limits)


def _start(kind: str, check: Check, limits: Limits) -> _Child:
    mine, its = multiprocessing.Pipe(duplex=False)
    folder = tempfile.TemporaryDirectory(prefix="sweep-")
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(kind, check, limits, Path(folder.name), its), daemon=True
    )
    process.start()
    its.close()
    return _Child(kind, process, mine, time.monotonic(), folder)


def _child(kind: str, check: Check, limits: Limits, folder: Path, answer: Connection) -> None:
    size = int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    with open(os.devnull, "w") as nothing:  # models print warnings about their random weights
        sys.stdout = sys.stderr = nothing
        began = time.perf_counter()
        try:
            row = check(kind, folder)
        except MemoryError:
            row = Row(kind, failures={"limits": f"it takes more than {limits.gigabytes:g} GB"})
        except Exception as error:  # also torch's error for a lack of memory
            row = Row(kind, failures={"limits": described(error)})
        row.seconds = time.perf_counter() - began
        answer.send(row)


def _finish(child: _Child, limits: Limits) -> Row:
    seconds = time.monotonic() - child.began
    try:
        row = child.answer.recv() if child.answer.poll() else None
    except EOFError:  # the child ended without a word
        row = None
    if row is None:
        if child.process.is_alive() and seconds <= limits.seconds:
            child.process.join(5)  # its end of the pipe is closed, so it is about to end
        if child.process.is_alive():
            why = f"it takes more than {limits.seconds:g} s"
        else:
            code = child.process.exitcode
            why = f"it crashed: {signal.Signals(-code).name if code and code < 0 else f'exit status {code}'}"
        row = Row(child.kind, failures={"limits": why}, seconds=seconds)
    child.process.kill()
    child.process.join()
    child.answer.close()
    child.folder.cleanup()
    return row
