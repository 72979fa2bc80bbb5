"""Compiled Metal kernels: one small library per kernel file, format and float type, compiled at first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .formats import Struct, struct_of
from .source import assemble

TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
IDS = {torch.int32: "int", torch.int64: "long"}

Kernel = Callable[..., None]
Compiler = Callable[[str], Any]


def most_tokens(struct: Struct) -> int:
    """Return how many rows of x a lane of gemv.metal can process at a time: it keeps its part of each in registers."""
    return 64 // struct.unit


def _instances(file: str, struct: Struct, real: str) -> dict[str, str]:
    """Return the kernels of a file for a format and a float type: {name for the host: instance of the template}."""
    both = f"{struct.name}, {real}"
    if file == "dequantize":
        rows = {f"embedding_{id}": f"embedding<{both}, {id}>" for id in IDS.values()}
        return {"dequantize": f"dequantize<{both}>", **rows}
    if file == "gemv":
        products = {f"gemv_{tokens}": f"gemv<{both}, {tokens}>" for tokens in range(1, most_tokens(struct) + 1)}
        return products | {f"experts_gemv_{id}": f"experts_gemv<{both}, {id}>" for id in IDS.values()}
    if file == "gemm":
        return {name: f"{name}<{both}>" for name in ("gemm", "experts_gemm")}
    assert file == "quantize" and struct.quantizes, f"no {file} for {struct.name}"
    return {"quantize": f"quantize<{both}>"}


def files(fmt: str) -> tuple[str, ...]:
    """Return the files of csrc/metal/kernels that have kernels for a format, without ".metal"."""
    return ("dequantize", "gemv", "gemm", *(["quantize"] if struct_of(fmt).quantizes else []))


def kernel(file: str, name: str, fmt: str, dtype: torch.dtype) -> Kernel:
    """Return a kernel. It is called with its buffers, threads= and group_size=, as torch.mps.compile_shader documents.

    Args:
        file: file of the kernel in csrc/metal/kernels, without ".metal".
        name: name of the kernel, see `_instances`.
        fmt: canonical name of the format.
        dtype: type of activations, or of decoded or original weights.
    """
    return _kernel(_compiler, file, name, fmt, dtype)


@cache  # looking up a function by name in the library takes as long as a launch
def _kernel(compiler: Compiler, file: str, name: str, fmt: str, dtype: torch.dtype) -> Kernel:
    function: Kernel = getattr(_library(compiler, file, fmt, dtype), name)
    return function


@cache
def _library(compiler: Compiler, file: str, fmt: str, dtype: torch.dtype) -> Any:
    """Compile all kernels of a file for a format.

    Raises:
        RuntimeError: the source does not compile. The message names the file, the kernels and the line.
    """
    struct = struct_of(fmt)
    instances = _instances(file, struct, TYPES[dtype])
    source = assemble(f"metal/kernels/{file}.metal", struct.header, instances)
    try:
        return compiler(source)
    except (RuntimeError, SyntaxError) as error:
        raise RuntimeError(
            f"isqtorch: csrc/metal/kernels/{file}.metal does not compile for {fmt} and {TYPES[dtype]} "
            f"({', '.join(instances)}). Please report this, with the versions of macOS and of torch ({torch.__version__}):"
            f"\n{error}"
        ) from error


def compile_all(fmt: str, dtype: torch.dtype) -> None:
    """Compile all kernels for a format.

    Raises:
        RuntimeError: as `_library`.
    """
    for file in files(fmt):
        _library(_compiler, file, fmt, dtype)


def _mps(source: str) -> Any:
    return torch.mps.compile_shader(source)


_compiler: Compiler = _mps


def use_compiler(compiler: Compiler | None) -> None:
    """Replace torch.mps.compile_shader by another compiler: the emulator of the tests. None restores it."""
    global _compiler
    _compiler = compiler or _mps
