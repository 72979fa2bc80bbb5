"""The GGUF container: read its metadata and its directory of tensors. Every number of a file is checked.

"GGUF" | version u32 | number of tensors u64 | number of metadata entries u64
metadata entry:   key string | type u32 | value                      string: length u64 | bytes
directory entry:  name string | number of dims u32 | dims u64[] (contiguous one first) | type u32 | offset u64
padding to `general.alignment`, then the tensors; offsets count from here
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .binary import BinaryReader

MAGIC = b"GGUF"
F32 = 0  # the tensor type number of f32

_KINDS = {
    0: "u8",
    1: "i8",
    2: "u16",
    3: "i16",
    4: "u32",
    5: "i32",
    6: "f32",
    10: "u64",
    11: "i64",
    12: "f64",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_ENTRIES = 1 << 17  # tensors, metadata entries: far above any real file, quick to loop over
_MAX_STRINGS = 1 << 20  # of one array: the vocabulary of a model
_MAX_ALIGNMENT = 1 << 20
_ALIGNMENT = 32  # the default of the file format

Value = int | float | bool | str | list[str] | NDArray[Any]
"""A metadata value. Arrays of numbers and flags are numpy arrays."""


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the directory. Size and offset are checked when the tensor is read."""

    name: str
    dims: tuple[int, ...]  # as stored: the contiguous dimension first
    type: int
    offset: int  # from the start of the tensor data
    at: int  # byte of the file where this entry starts, for messages


class GgufFile:
    """A GGUF file whose header has been read: `metadata`, `tensors` (the directory, by name) and `alignment`."""

    def __init__(self, reader: BinaryReader) -> None:
        """Read the header. Raise ValueError if it is malformed."""
        self._reader = reader
        magic = reader.take(4, "magic")
        assert magic == MAGIC, "callers look at the magic first"
        version = reader.integer("u32", "version")
        if version not in (2, 3):
            hint = " (a big-endian file?)" if version in (2 << 24, 3 << 24) else ""
            raise reader.error(f"GGUF version {version}{hint}, only 2 and 3 can be read", 4)
        tensor_count = reader.count("u64", "number of tensors", 33, _MAX_ENTRIES)
        value_count = reader.count("u64", "number of metadata entries", 14, _MAX_ENTRIES)
        self.metadata = self._read_metadata(value_count)
        self.tensors = self._read_directory(tensor_count)
        self.alignment = self._read_alignment()
        self._data_start = -(-reader.position // self.alignment) * self.alignment

    def read_f32(self, tensors: Iterable[GgufTensor]) -> dict[str, NDArray[np.float32]]:
        """Read f32 tensors. Return them by name, each flattened to `[product of dims]`.

        Raises:
            ValueError: a tensor has another type or a misaligned offset, lies outside the file, or overlaps another
                one. All tensors are checked before memory is allocated.
        """
        wanted = list(tensors)
        for tensor in wanted:
            if tensor.type != F32:
                raise self._reader.error(
                    f"tensor {tensor.name!r} has type {tensor.type}, must be {F32} (f32)", tensor.at
                )
        # without overlaps, all tensors together need no more memory than the file's size
        placed = [(start, end, tensor) for tensor, (start, end) in self.placed(wanted, {F32: (1, 4)}).items()]
        values = {}
        for start, end, tensor in placed:
            self._reader.seek(start)
            values[tensor.name] = self._reader.floats((end - start) // 4, f"tensor {tensor.name!r}")
        return values

    def placed(
        self, tensors: Iterable[GgufTensor], sizes: Mapping[int, tuple[int, int]]
    ) -> dict[GgufTensor, tuple[int, int]]:
        """Where tensors lie in the file, in their order there.

        Args:
            tensors: entries of the directory.
            sizes: {type of a tensor: (elements of a block, bytes of a block)}.

        Returns:
            {tensor: (first byte, byte after the last)}.

        Raises:
            ValueError: a tensor has an unknown type, a row that is not made of whole blocks or a misaligned offset, lies
                outside of the file, or overlaps another one.
        """
        found = {tensor: self._place(tensor, sizes) for tensor in tensors}
        ordered = dict(sorted(found.items(), key=lambda item: item[1]))
        end_before = 0
        for tensor, (start, end) in ordered.items():
            if start < end_before:
                raise self._reader.error(f"tensor {tensor.name!r} overlaps the one before it", start)
            end_before = end
        return ordered

    def _place(self, tensor: GgufTensor, sizes: Mapping[int, tuple[int, int]]) -> tuple[int, int]:
        """Return (first byte, byte after the last) of a tensor in the file."""
        what = f"tensor {tensor.name!r}"
        if tensor.type not in sizes:
            raise self._reader.error(
                f"{what} has type {tensor.type}, which is none of ggml's types that can be read", tensor.at
            )
        block, block_bytes = sizes[tensor.type]
        if tensor.dims[0] % block:
            raise self._reader.error(
                f"{what} has rows of {tensor.dims[0]} elements, which are no whole blocks of {block}", tensor.at
            )
        if tensor.offset % self.alignment:
            raise self._reader.error(
                f"{what} has offset {tensor.offset}, must be a multiple of {self.alignment}", tensor.at
            )
        start = self._data_start + tensor.offset
        end = start + prod(tensor.dims) // block * block_bytes
        if end <= start or end > self._reader.size:
            raise self._reader.error(
                f"{what} of shape {list(tensor.dims)} would lie at bytes {start} to {end}, "
                f"the file has {self._reader.size}",
                tensor.at,
            )
        return start, end

    # ---- header ------------------------------------------------------------------------------------------------------

    def _read_metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            at = self._reader.position
            key = self._reader.name("u64", "metadata key")
            if key in metadata:
                raise self._reader.error(f"metadata key {key!r} appears twice", at)
            metadata[key] = self._read_value(key)
        return metadata

    def _read_value(self, key: str) -> Value:
        at = self._reader.position
        what = f"metadata {key!r}"
        kind = self._reader.integer("u32", f"type of {what}")
        if kind == _STRING:
            return self._reader.text("u64", what)
        if kind in _KINDS:
            return self._reader.scalar(_KINDS[kind], what)
        if kind == _BOOL:
            return bool(self._reader.integer("u8", what))
        if kind != _ARRAY:
            raise self._reader.error(f"{what} has unknown type {kind}", at)
        kind = self._reader.integer("u32", f"element type of {what}")
        if kind == _STRING:
            count = self._reader.count("u64", f"length of {what}", 8, _MAX_STRINGS)
            return self._reader.texts("u64", count, what)
        if kind in _KINDS or kind == _BOOL:
            name = _KINDS.get(kind, "u8")
            values = self._reader.numbers(
                name, self._reader.count("u64", f"length of {what}", self._reader.width(name)), what
            )
            return values.astype(bool) if kind == _BOOL else values
        raise self._reader.error(f"{what} is an array with elements of type {kind}, which no known file has", at)

    def _read_directory(self, count: int) -> dict[str, GgufTensor]:
        reader = self._reader
        tensors: dict[str, GgufTensor] = {}
        for _ in range(count):
            at = reader.position
            name = reader.name("u64", "tensor name")
            if name in tensors:
                raise reader.error(f"tensor {name!r} appears twice", at)
            n_dims = reader.integer("u32", f"number of dims of tensor {name!r}")
            if not 1 <= n_dims <= 4:
                raise reader.error(f"tensor {name!r} has {n_dims} dims, must be 1 to 4", at)
            dims = tuple(reader.integer("u64", f"dims of tensor {name!r}") for _ in range(n_dims))
            kind = reader.integer("u32", f"type of tensor {name!r}")
            tensors[name] = GgufTensor(name, dims, kind, reader.integer("u64", f"offset of tensor {name!r}"), at)
        return tensors

    def _read_alignment(self) -> int:
        value = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(value, int) or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
            raise self._reader.error(
                f"metadata 'general.alignment' is {value!r}, must be a power of two up to {_MAX_ALIGNMENT}"
            )
        return value
