"""How fast this machine reads memory: the roof over every product with few rows.

A loop in C, compiled here if there is a compiler, reads a buffer with full vectors, in one stream or in four at a time; without a
compiler torch.sum reads. The buffer comes from torch's allocator, as packed weights do.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .timing import Spent, interleave, spend

_SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
typedef uint64_t vec __attribute__((vector_size(64)));
static volatile uint64_t sink;  /* a sum that nobody needs is not computed */

static void keep(vec a) { for (int i = 0; i < 8; i++) sink = a[i]; }

/* All repetitions in one call: between calls threads would wait for each other's turn in Python. */
void read_one(const char *p, size_t n, size_t times) {
  for (; times; times--) {
    vec a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i + 256 <= n; i += 256) {
      const vec *q = (const vec *)(p + i);
      a += q[0], b += q[1], c += q[2], d += q[3];
    }
    keep(a + b + c + d);
  }
}

void read_four(const char *p, size_t n, size_t times) {
  size_t part = n / 4 & ~(size_t)63;
  for (; times; times--) {
    vec a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i + 64 <= part; i += 64) {
      a += *(const vec *)(p + i), b += *(const vec *)(p + part + i);
      c += *(const vec *)(p + 2 * part + i), d += *(const vec *)(p + 3 * part + i);
    }
    keep(a + b + c + d);
  }
}
"""

Reader = Callable[[int, int, int], None]  # address, bytes, times


def _compiled() -> dict[str, Reader]:
    """The C loops by name; none without a compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "read.c"), Path(folder, "read.so")
        source.write_text(_SOURCE)
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode:
            return {}
        loaded = ctypes.CDLL(str(library))
    readers: dict[str, Reader] = {}
    for name, function in (("C, one stream", loaded.read_one), ("C, four streams", loaded.read_four)):
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
        readers[name] = function
    return readers


class Stream:
    """Reads a buffer piece by piece, going on where the last call ended; a contender beside the products.

    Args:
        buffer: uint8, contiguous; larger than the caches for the memory's bandwidth, small for a cache's.
        threads: each reads its part of every piece.
        reader: a C loop; None for torch.sum.
        volume: bytes that a call reads, a small buffer several times; so many that starting a second thread does not show.
    """

    def __init__(
        self, buffer: Tensor, *, threads: int = 1, reader: Reader | None = None, volume: int = 1 << 27
    ) -> None:
        self._piece = min(volume, buffer.numel())
        self._again = volume // self._piece
        self.nbytes = self._piece * self._again
        self._buffer, self._threads, self._reader, self._turn = buffer, threads, reader, 0

    def __call__(self) -> None:
        start = self._turn * self._piece
        self._turn = (self._turn + 1) % (self._buffer.numel() // self._piece)
        if self._reader is None:
            for _ in range(self._again):
                self._buffer[start : start + self._piece].view(torch.int64).sum()
            return
        part = self._piece // self._threads
        address = self._buffer.data_ptr() + start
        others = [threading.Thread(target=self._read, args=(address + i * part, part)) for i in range(1, self._threads)]
        for thread in others:
            thread.start()
        self._read(address, part)
        for thread in others:
            thread.join()

    def _read(self, address: int, nbytes: int) -> None:
        assert self._reader
        self._reader(address, nbytes, self._again)

    def run(self, calls: int) -> Spent:
        torch.set_num_threads(self._threads)
        return spend(self, calls)


class Bandwidth:
    """The fastest way to read, found by trying all on one thread."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._readers: dict[str, Reader | None] = {**_compiled(), "torch.sum of int64": None}
        trials = {name: Stream(buffer, reader=reader) for name, reader in self._readers.items()}
        times = interleave(trials, rounds=9, seconds=0, warm=False)
        self.method = min(times, key=lambda name: times[name].median())

    def stream(self, *, threads: int = 1) -> Stream:
        """A contender that reads memory."""
        return Stream(self._buffer, threads=threads, reader=self._readers[self.method])

    def cached(self, nbytes: int, *, threads: int = 1) -> Stream:
        """A contender that reads the same `nbytes` again and again."""
        buffer = self._buffer[: nbytes // 256 * 256]
        return Stream(buffer, threads=threads, reader=self._readers[self.method], volume=1 << 30)
