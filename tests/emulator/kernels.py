"""The CUDA kernels in the emulator, called as the operators call them: with the job structs of csrc/cuda/launch.h.

    with kernels.Memory() as memory:
        weight, out = memory.put(packed, "weight", align=2), memory.new((4, 64), torch.float32, "out")
        kernels.decode("q4_0", weight=weight, rows=4, k=64, dtype=torch.float32, out=out)

Tensors of a `Memory` end where memory ends and new ones are full of NaN. `EMULATOR_VARIANT=asan` (or tsan) chooses an
instrumented build, which needs its runtime loaded first: `sanitized_pytest` runs tests that way.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from csrc.cuda.build import units

from . import build

VARIANT = os.environ.get("EMULATOR_VARIANT", "plain")
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER = ctypes.c_void_p


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_I64, _BOOL, _DTYPE, _RULE = ctypes.c_int64, ctypes.c_bool, ctypes.c_uint8, ctypes.c_uint8
JOBS = {
    "decode": _struct(
        "DecodeJob",
        weight=_POINTER,
        rows=_I64,
        k=_I64,
        dtype=_DTYPE,
        out=_POINTER,
        ids=_POINTER,
        wide_ids=_BOOL,
        count=_I64,
    ),
    "linear": _struct(
        "LinearJob",
        x=_POINTER,
        weight=_POINTER,
        bias=_POINTER,
        y=_POINTER,
        dtype=_DTYPE,
        m=_I64,
        n=_I64,
        k=_I64,
        workspace=_POINTER,
    ),
    "experts": _struct(
        "ExpertsJob",
        x=_POINTER,
        rows_per_slot=_BOOL,
        weight=_POINTER,
        bias=_POINTER,
        ids=_POINTER,
        wide_ids=_BOOL,
        y=_POINTER,
        dtype=_DTYPE,
        tokens=_I64,
        slots=_I64,
        experts=_I64,
        n=_I64,
        k=_I64,
        workspace=_POINTER,
    ),
    "quantize": _struct(
        "QuantizeJob",
        w=_POINTER,
        dtype=_DTYPE,
        rows=_I64,
        k=_I64,
        importance=_POINTER,
        rule=_RULE,
        out=_POINTER,
        faults=_POINTER,
        workspace=_POINTER,
    ),
}
PARTS = _struct("Fp8Parts", codes=_POINTER, scales=_POINTER, rows=_I64, k=_I64)
_FP8: dict[str, list[Any]] = {
    "quantize_activations": [_POINTER, _DTYPE, _I64, ctypes.POINTER(PARTS)],
    "split_fp8": [_POINTER, ctypes.POINTER(PARTS)],
    "add_bias": [_POINTER, _POINTER, _DTYPE, _I64, _I64],
}


class KernelError(RuntimeError):
    """A launch failed, or there is no such kernel."""


def _built(variant: str) -> Path:
    own = [build.HERE / "kernels.cpp", build.HERE / "formats.cu"]
    return build.library("kernels", [*own, *units()], variant, ("-O1",))


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(_built(VARIANT)))
    loaded.kernels_error.restype = ctypes.c_char_p
    loaded.kernels_name.restype = ctypes.c_char_p
    loaded.emulator_new_buffer.restype = ctypes.c_void_p
    loaded.emulator_new_buffer.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p]
    loaded.emulator_delete_buffer.argtypes = [ctypes.c_void_p]
    for job in [*JOBS, "linear_workspace", "experts_workspace", "quantize_workspace"]:
        function = getattr(loaded, f"kernels_{job}")
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    for name, arguments in _FP8.items():
        function = getattr(loaded, f"kernels_{name}")
        function.restype, function.argtypes = ctypes.c_int64, arguments
    structs = [*JOBS.values(), PARTS]
    sizes = (ctypes.c_int64 * len(structs))()
    loaded.kernels_job_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(job) for job in structs], "the structures do not agree with launch.h"
    return loaded


def names() -> list[str]:
    """The formats of the kernels' table."""
    return [library().kernels_name(i).decode() for i in range(library().kernels_count())]


def facts(name: str) -> dict[str, int]:
    """What the table says of a format."""
    values = (ctypes.c_int64 * 6)()
    library().kernels_facts(name.encode(), values)
    return dict(zip(["block", "block_bytes", "align", "rules", "few_rows", "max_rows"], values, strict=True))


@contextmanager
def schedule(order: str = "forward", late_copies: bool = True, seed: int = 1) -> Iterator[None]:
    """In which order threads get their turn, and when asynchronous copies are made."""
    library().emulator_options(ORDERS[order], seed, 0, int(late_copies))
    try:
        yield
    finally:
        library().emulator_options(0, 1, 0, 1)


@contextmanager
def shared_memory(limit: int) -> Iterator[None]:
    """Blocks may have so many bytes of shared memory; a launch that asks for more fails."""
    library().emulator_shared_limit(ctypes.c_size_t(limit))
    try:
        yield
    finally:
        library().emulator_shared_limit(ctypes.c_size_t(227 << 10))


class Memory:
    """The GPU's memory: every tensor on pages of its own, with nothing behind its last byte. It is freed with its tensor."""

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, name: str, align: int = 16) -> Tensor:
        """A tensor full of 0xff bytes, NaN for floats.

        Args:
            name: for messages about stray accesses.
            align: what its address is a multiple of. Its end is the end of memory, up to this.
        """
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        buffer = library().emulator_new_buffer(size, align, name.encode())
        if not buffer:
            raise MemoryError(f"{size} bytes for {name}")
        raw = (ctypes.c_uint8 * size).from_address(buffer)
        weakref.finalize(raw, library().emulator_delete_buffer, buffer)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)

    def put(self, tensor: Tensor, name: str, align: int = 16) -> Tensor:
        """A copy of `tensor`."""
        copy = self.new(tuple(tensor.shape), tensor.dtype, name, align)
        return copy.copy_(tensor)


def run(what: str, format: str, **fields: Any) -> int:
    """Call a function of the format's table: "decode", "linear", "experts", "quantize", "experts_workspace", ...

    Args:
        fields: members of its job. Tensors stand for their addresses; a member not given is 0 or null.

    Returns:
        What a workspace function returns; 0 for others.
    """
    job = JOBS[what.removesuffix("_workspace")]()
    for name, value in fields.items():
        if not any(name == field for field, _ in job._fields_):
            raise TypeError(f"{type(job).__name__} has no {name}")
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            value = value.data_ptr()
        setattr(job, name, _DTYPES.get(value, value) if isinstance(value, torch.dtype) else value)
    result = getattr(library(), f"kernels_{what}")(format.encode(), ctypes.byref(job))
    if result < 0:
        raise KernelError(library().kernels_error().decode())
    return int(result)


def run_fp8(what: str, *arguments: Any) -> None:
    """Call a kernel that only fp8 has: "quantize_activations", "split_fp8", "add_bias". Tensors stand for their addresses."""

    def passed(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return _DTYPES[value]
        return value.data_ptr() if isinstance(value, Tensor) else value

    if getattr(library(), f"kernels_{what}")(*map(passed, arguments)) < 0:
        raise KernelError(library().kernels_error().decode())


def sanitized_pytest(variant: str, *arguments: str) -> None:
    """Run tests again under a sanitizer; what it says is in the error."""
    _built(variant)
    command, environment = build.sanitized(variant, [sys.executable, "-m", "pytest", "-q", "-x", "-s", *arguments])
    environment |= {"EMULATOR_VARIANT": variant, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
