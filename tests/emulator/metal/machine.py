"""Compiled shaders through ctypes: kernels, guarded buffers, launches. Knows neither torch nor compilers."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
BUFFER = 0  # simt::metal::Input::kBuffer


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("input", ctypes.c_int),
        ("index", ctypes.c_int),
        ("bytes", ctypes.c_uint),
        ("writes", ctypes.c_bool),
    ]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("count", ctypes.c_int),
        ("most_threads", ctypes.c_int),
        ("run", ctypes.c_void_p),
    ]


class MetalError(RuntimeError):
    """What the emulator says of a launch that went wrong."""


@dataclass(frozen=True)
class Bound:
    """What a kernel expects in one buffer slot: at least so many bytes, and whether it may write there."""

    bytes: int
    writes: bool


class Kernel:
    """A kernel of a library."""

    def __init__(self, machine: Machine, table: _Kernel) -> None:
        self.name: str = table.name.decode()
        self.most_threads: int = table.most_threads
        parameters = [table.parameters[i] for i in range(table.count)]
        self.bound = {p.index: Bound(p.bytes, p.writes) for p in parameters if p.input == BUFFER}
        self._machine, self._table = machine, table

    def launch(self, addresses: list[int], threads: list[int], group: list[int]) -> None:
        """Runs the kernel on bound memory; `threads` and `group` have three numbers. Raises MetalError."""
        buffers = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        three = ctypes.c_uint * 3
        error = self._machine.core.metal_launch(ctypes.byref(self._table), buffers, three(*threads), three(*group))
        if error:
            raise MetalError(f"{self.name}: {_with_line(error.decode())}")


class Machine:
    """The kernels of one library, and the emulator that runs them."""

    def __init__(self, path: Path) -> None:
        self.core = ctypes.CDLL(str(path))  # finds the emulator's functions in the library that it depends on
        self.core.metal_kernels.restype = ctypes.POINTER(_Kernel)
        self.core.metal_launch.restype = ctypes.c_char_p
        self.core.metal_launch.argtypes = [ctypes.c_void_p] * 4
        self.core.emulator_new_buffer.restype = ctypes.c_void_p
        self.core.emulator_new_buffer.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p]
        self.core.emulator_delete_buffer.argtypes = [ctypes.c_void_p]
        count = ctypes.c_int()
        table = self.core.metal_kernels(ctypes.byref(count))
        self.kernels = {kernel.name: kernel for kernel in (Kernel(self, table[i]) for i in range(count.value))}

    def set_options(self, order: str = "forward", seed: int = 1, workers: int = 1) -> None:
        """In which order threads and threadgroups get their turn, and how many threadgroups run at a time."""
        self.core.emulator_options(ORDERS[order], seed, workers, 1)

    def new_buffer(self, size: int, alignment: int, name: str) -> int:
        """The address of memory between guard pages, full of 0xff."""
        address = self.core.emulator_new_buffer(size, alignment, name.encode())
        if not address:
            raise MemoryError(f"a buffer of {size} bytes")
        return int(address)

    def delete_buffer(self, address: int) -> None:
        self.core.emulator_delete_buffer(address)


@contextmanager
def bound_memory(machine: Machine, plan: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The addresses of a launch's arguments, and those of its memories."""
    made: list[int] = []

    def new(data: bytes, alignment: int, name: str) -> int:
        address = machine.new_buffer(len(data), alignment, name)
        made.append(address)
        ctypes.memmove(address, data, len(data))
        return address

    try:
        buffers = [new(memory["data"], memory["alignment"], memory["name"]) for memory in plan["memories"]]
        addresses = []
        for i, arg in enumerate(plan["args"]):
            if isinstance(arg, bytes):
                addresses.append(new(arg, 8, f"argument {i}"))
            elif isinstance(arg, list):
                pointers = [buffers[place["memory"]] + place["offset"] for place in arg]
                addresses.append(new(struct.pack(f"{len(pointers)}Q", *pointers), 8, f"argument {i}"))
            else:
                addresses.append(buffers[arg["memory"]] + arg["offset"])
        yield addresses, buffers
    finally:
        for address in made:
            machine.delete_buffer(address)


def _with_line(error: str) -> str:
    """An error whose code address, [library+0x123], is replaced by a line of the shader, where addr2line knows it."""
    match = re.search(r" \[(\S+)\+(0x[0-9a-f]+)\]", error)
    if not match or not shutil.which("addr2line"):
        return error
    said = subprocess.run(["addr2line", "-i", "-e", match[1], match[2]], capture_output=True, text=True).stdout
    lines = [
        line.split(" (")[0].replace("./", "") for line in said.splitlines() if "?" not in line and "/shim/" not in line
    ]
    return error.replace(match[0], f" at {lines[0]}" if lines else match[0])
