"""Keep results independent of the process's flush-to-zero mode.

`torch.set_flush_denormal(True)`, or any library built with -ffast-math, makes the CPU treat subnormal floats as zero.
The searches multiply up to four small numbers, so this mode would change quantized bytes. The mode is a property of a
thread, torch cannot query it, and operations on many elements run on other threads. Therefore the quantizers work
inside `denormals_kept()`, in chunks that torch processes on the calling thread.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PARALLEL_FROM = 32768  # at::internal::GRAIN_SIZE: element-wise operations on fewer elements run on the calling thread


@contextmanager
def denormals_kept() -> Iterator[None]:
    """Switch flush-to-zero off on this thread, and back on at the end if it was on."""
    flushed = sys.float_info.min / 2 == 0.0
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)


def blocks_per_chunk(block: int, device: torch.device) -> int:
    """Return how many blocks of `block` weights to process at a time: on a CPU few enough to stay on one thread."""
    elements = _PARALLEL_FROM - 1 if device.type == "cpu" else 1 << 22
    return max(1, elements // block)
