"""`compile_shader(source)`: the interface of torch.mps.compile_shader, with CPU tensors in the place of MPS tensors.

What torch does not check is not checked here either: a kernel sees a tensor's memory from its first element on, whatever
its strides are. What is wrong on a GPU, and goes unnoticed there, raises MetalError: reading or writing past the memory
that the tensor reaches, a missing argument, divergence, deadlock, ...
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from isqtorch.ops.metal import library

from . import compiler
from .machine import Kernel, Machine, MetalError, bound_memory

INTEGER_CASTS = {"int32": "i", "int16": "h", "int8": "b", "uint8": "B"}
FLOAT_CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
MOST_BYTES = 4096  # of what is passed by value
MOST_BUFFERS = 31

Launch = tuple[str, str | None, dict[str, Any]]  # source, filter, and what replay.py needs
_sinks: list[list[Launch]] = []  # of the recordings that go on
_options: dict[str, Any] = {}


@contextmanager
def schedule(order: str = "forward", seed: int = 1, workers: int = 1) -> Iterator[None]:
    """Inside, threads and threadgroups get their turn "forward", in "reverse", or "shuffled" by a seed."""
    global _options
    before, _options = _options, {"order": order, "seed": seed, "workers": workers}
    try:
        yield
    finally:
        _options = before


@contextmanager
def emulated() -> Iterator[None]:
    """Inside, isqtorch.ops.metal runs its shaders here, and torch.empty() gives NaN, or the largest integer."""
    library.use_compiler(compile_shader)
    deterministic, filled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        library.use_compiler(None)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def recording(launches: list[Launch] | None = None) -> Iterator[list[Launch]]:
    """Appends the launches made inside, those that succeed, with the memory they found, to a list for races.find()."""
    mine: list[Launch] = [] if launches is None else launches
    _sinks.append(mine)
    try:
        yield mine
    finally:
        _sinks.pop()


def compile_shader(source: str, only: str | None = None, strict: bool = True) -> Library:
    """Compiles Metal source, or takes what an earlier process compiled from the same text.

    Args:
        source: Complete but for Metal's own headers.
        only: A regular expression: kernels whose names do not contain it are left out. torch has no such argument.
        strict: Also lint, and check address spaces and language. Nor this one.

    Raises:
        CompileError: a SyntaxError, as torch raises, with the compiler's message.
    """
    return Library(source, only, strict)


class Library:
    """A shader's kernels, as attributes; dir() lists them."""

    def __init__(self, source: str, only: str | None = None, strict: bool = True) -> None:
        self._source, self._only = source, only
        self._machine = Machine(compiler.library(source, only=only, strict=strict))

    def __dir__(self) -> list[str]:
        return [*self._machine.kernels]

    @functools.cache  # noqa: B019  # libraries live as long as the process
    def __getattr__(self, name: str) -> Function:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._machine.kernels:
            raise RuntimeError(f"no kernel {name!r} in this library: {', '.join(dir(self))}")
        return Function(self._machine, self._machine.kernels[name], self._source, self._only)


@dataclass
class Memory:
    """Tensors of one launch that share bytes: [begin, end) of the process's memory, and the emulator's copy."""

    begin: int
    end: int
    name: str
    alignment: int
    writes: bool
    address: int = 0


class Function:
    """A kernel that can be called."""

    thread_execution_width = 32

    def __init__(self, machine: Machine, kernel: Kernel, source: str, only: str | None) -> None:
        self._machine, self._kernel, self._source, self._only = machine, kernel, source, only

    @property
    def max_threads_per_threadgroup(self) -> int:
        return self._kernel.most_threads

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
    ) -> None:
        """Runs the kernel with args in buffers 0, 1, ...

        Args:
            args: Tensors; or, by value, ints (8 bytes), floats (4 bytes) and lists of either; or lists of tensors, which
                become their addresses.
            threads: In all, 1 to 3 numbers; by default as many as the first tensor has elements.
            group_size: Threads per threadgroup, as many numbers.
            arg_casts: Another type for numbers, for all or by index: int32, int16, int8, uint8, fp16, bf16.

        Raises:
            MetalError: the launch went wrong; tensors keep what they had.
            TypeError, ValueError: arguments that torch does not take either.
        """
        name = self._kernel.name
        if threads is None:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            if not tensors:
                raise ValueError(f"{name}: threads, or a tensor whose elements are counted")
            threads = tensors[0].numel()
        grid = [threads] if isinstance(threads, int) else [*threads]
        if group_size is None:
            if len(grid) > 1:
                raise ValueError(f"{name}: group_size must be given with {len(grid)} dimensions of threads")
            group_size = min(grid[0], self.max_threads_per_threadgroup)
        group = [group_size] if isinstance(group_size, int) else [*group_size]
        if len(group) != len(grid) or not 1 <= len(grid) <= 3:
            raise ValueError(f"{name}: threads {grid} and group_size {group} need one to three numbers, as many each")
        if min(grid + group) < 1:
            raise ValueError(f"{name}: threads {grid} and group_size {group} must be positive")
        size = functools.reduce(int.__mul__, group)
        if size > self.max_threads_per_threadgroup:
            raise ValueError(f"{name}: {size} threads in a threadgroup; at most {self.max_threads_per_threadgroup}")
        self._check_slots(len(args))
        self._launch(args, arg_casts, [*grid, 1, 1][:3], [*group, 1, 1][:3])

    def _check_slots(self, count: int) -> None:
        bound = self._kernel.bound
        if count > MOST_BUFFERS or sorted(bound) != list(range(count)):
            raise MetalError(f"{self._kernel.name}: its buffers are {sorted(bound)}, the call has {count} arguments")

    def _launch(
        self, args: Sequence[Any], casts: str | dict[int, str] | None, grid: list[int], group: list[int]
    ) -> None:
        """Copies memory in, runs, copies back what the kernel may have written."""
        memories = self._memories(args)
        values = {
            i: _by_value(arg, casts.get(i) if isinstance(casts, dict) else casts, f"{self._kernel.name}: argument {i}")
            for i, arg in enumerate(args)
            if not _tensors(arg)
        }
        plan: dict[str, Any] = {"kernel": self._kernel.name, "threads": grid, "group": group, "args": []}
        plan["memories"] = [
            {"name": m.name, "alignment": m.alignment, "data": ctypes.string_at(m.begin, m.end - m.begin)}
            for m in memories
        ]
        for i, arg in enumerate(args):
            places = [_place(tensor, memories) for tensor in _tensors(arg)]
            if i in values:
                plan["args"].append(values[i])
            else:
                plan["args"].append(places if isinstance(arg, list | tuple) else places[0])
        for i, expected in self._kernel.bound.items():
            has = _size(plan["args"][i], plan["memories"])
            if has < expected.bytes:
                raise MetalError(f"{self._kernel.name}: buffer({i}) has {has} bytes, of {expected.bytes} that are read")
        self._machine.set_options(**_options)
        with bound_memory(self._machine, plan) as (addresses, buffers):
            self._kernel.launch(addresses, grid, group)
            for memory, address in zip(memories, buffers, strict=True):
                if memory.writes:
                    ctypes.memmove(memory.begin, address, memory.end - memory.begin)
        for sink in _sinks:
            sink.append((self._source, self._only, plan))

    def _memories(self, args: Sequence[Any]) -> list[Memory]:
        """The memory that the tensors reach; tensors that overlap share theirs, as on a GPU."""
        found = []
        for i, arg in enumerate(args):
            for tensor in _tensors(arg):
                if tensor.device.type != "cpu":
                    raise TypeError(
                        f"{self._kernel.name}: argument {i} is on {tensor.device}; the emulator has CPU tensors"
                    )
                steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                begin = tensor.data_ptr()
                end = begin + (steps + 1) * tensor.element_size() if tensor.numel() else begin
                # through a list of tensors anything may be written
                writes = self._kernel.bound[i].writes or isinstance(arg, list | tuple)
                found.append(Memory(begin, end, f"argument {i}", tensor.element_size(), writes))
        found.sort(key=lambda memory: (memory.begin, -memory.end))
        merged: list[Memory] = []
        for memory in found:
            last = merged[-1] if merged else None
            if last and (memory.begin < last.end or memory.begin == last.begin):
                last.end = max(last.end, memory.end)
                last.name += f" and {memory.name.removeprefix('argument ')}"
                last.writes |= memory.writes
            else:
                merged.append(memory)
        return merged


def _tensors(arg: Any) -> list[torch.Tensor]:
    if isinstance(arg, torch.Tensor):
        return [arg]
    return [*arg] if isinstance(arg, list | tuple) and arg and all(isinstance(x, torch.Tensor) for x in arg) else []


def _place(tensor: torch.Tensor, memories: list[Memory]) -> dict[str, int]:
    """Which memory a tensor begins in, and at which byte."""
    begin = tensor.data_ptr()
    index = max(i for i, memory in enumerate(memories) if memory.begin <= begin)
    return {"memory": index, "offset": begin - memories[index].begin}


def _size(arg: bytes | list[dict[str, int]] | dict[str, int], memories: list[dict[str, Any]]) -> int:
    if isinstance(arg, bytes):
        return len(arg)
    return 8 * len(arg) if isinstance(arg, list) else len(memories[arg["memory"]]["data"]) - arg["offset"]


def _by_value(arg: Any, cast: str | None, where: str) -> bytes:
    """The bytes of a number or of a list of numbers."""
    numbers = [*arg] if isinstance(arg, list | tuple) else [arg]
    kinds = {type(number) for number in numbers}
    if kinds <= {int, bool} and kinds:
        if cast is not None and cast not in INTEGER_CASTS:
            raise ValueError(f"{where}: an int is cast to {', '.join(INTEGER_CASTS)}, not {cast}")
        data = struct.pack(f"{len(numbers)}{INTEGER_CASTS[cast] if cast else 'q'}", *numbers)
    elif kinds == {float}:
        if cast is not None and cast not in FLOAT_CASTS:
            raise ValueError(f"{where}: a float is cast to {', '.join(FLOAT_CASTS)}, not {cast}")
        values = torch.tensor(numbers, dtype=FLOAT_CASTS[cast] if cast else torch.float32)
        data = values.view(torch.uint8).numpy().tobytes()
    else:
        raise TypeError(f"{where}: a tensor, a number, or a list of one of these, not {arg!r}")
    if len(data) > MOST_BYTES:
        raise ValueError(f"{where}: {len(data)} bytes by value; at most {MOST_BYTES}: use a tensor")
    return data
