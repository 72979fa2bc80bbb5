"""Write GGUF files: any kind of metadata, any type of tensor, one tensor in memory at a time. gguf.py has the layout."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .gguf import F32, MAGIC
from .writing import replacing

ALIGNMENT = 32  # the default of the file format; a file that says nothing else must keep it
MAX_NAME_BYTES = 63  # of a tensor; llama.cpp refuses a file with a longer name
_MAX_DIMS = 4
_VERSION = 3
_STRING, _ARRAY, _BOOL, _F32, _U32, _I32, _U64, _I64 = 8, 9, 7, 6, 4, 5, 10, 11
_ELEMENTS = {
    "b1": _BOOL,
    "u1": 0,
    "i1": 1,
    "u2": 2,
    "i2": 3,
    "u4": _U32,
    "i4": _I32,
    "f4": _F32,
    "u8": _U64,
    "i8": _I64,
    "f8": 12,
}

Value = (
    str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float] | NDArray[np.generic]
)
"""A metadata value: an int is stored in the first of u32, i32, u64 and i64 that holds it (all of a list as i32), a float as
f32."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file that is to be written.

    Attributes:
        name: at most `MAX_NAME_BYTES` bytes.
        dims: as stored: the contiguous dimension first. Trailing dims of 1 are dropped, as ggml does.
        nbytes: size of the values.
        type: ggml's number of the type.
        read: returns the values, in pieces of any size; called once, when the tensor's turn has come. None for a caller
            that only needs the header.
    """

    name: str
    dims: tuple[int, ...]
    nbytes: int
    type: int = F32
    read: Callable[[], Iterable[bytes | memoryview]] | None = None


def write_gguf(path: str | os.PathLike[str], metadata: Mapping[str, Value], tensors: Sequence[Entry]) -> None:
    """Write a file. It appears under its name when it is complete; after an error, what was there is unchanged.

    Args:
        path: the file. A file of that name is replaced.
        metadata: by key. "general.architecture" should be the first one.
        tensors: in the order of the file.

    Raises:
        ValueError: as `encode_header`.
        OSError: the file cannot be written.
    """
    header = encode_header(metadata, tensors)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for tensor in tensors:
            _write_tensor(file, tensor)


def _write_tensor(file: BinaryIO, tensor: Entry) -> None:
    assert tensor.read is not None, f"{tensor.name}: nothing to write"
    written = sum(file.write(piece) for piece in tensor.read())
    assert written == tensor.nbytes, f"{tensor.name}: {written} bytes, must be {tensor.nbytes}"
    file.write(_padding(written))


def encode_header(metadata: Mapping[str, Value], tensors: Sequence[Entry]) -> bytes:
    """Encode the header of a file: all bytes before the first tensor.

    The tensors must follow the header in the same order, each padded to 32 bytes.

    Raises:
        ValueError: two tensors have the same name, or a name or the number of dims is more than GGUF allows.
    """
    out = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out += [_string(key), *_value(value)]
    offset = 0
    seen = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"two tensors have the name {tensor.name!r}")
        seen.add(tensor.name)
        if len(tensor.name.encode()) > MAX_NAME_BYTES:
            raise ValueError(
                f"{tensor.name!r} has more than {MAX_NAME_BYTES} bytes: llama.cpp could not read a GGUF file with it"
            )
        dims = list(tensor.dims)
        while len(dims) > 1 and dims[-1] == 1:
            dims.pop()
        if not 1 <= len(dims) <= _MAX_DIMS or prod(dims) == 0:
            raise ValueError(f"{tensor.name!r} has the dims {dims}: a GGUF tensor has 1 to {_MAX_DIMS}, and none is 0")
        out += [_string(tensor.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset)]
        offset += tensor.nbytes + len(_padding(tensor.nbytes))
    header = b"".join(out)
    return header + _padding(len(header))


def _padding(nbytes: int) -> bytes:
    return bytes(-nbytes % ALIGNMENT)


def _value(value: Value) -> list[bytes]:
    """The number of the type, and the value."""
    if isinstance(value, str):
        return [struct.pack("<I", _STRING), _string(value)]
    if isinstance(value, bool):
        return [struct.pack("<I?", _BOOL, value)]
    if isinstance(value, int):
        for kind, code, low, bits in (
            (_U32, "I", 0, 32),
            (_I32, "i", -1 << 31, 31),
            (_U64, "Q", 0, 64),
            (_I64, "q", -1 << 63, 63),
        ):
            if low <= value < 1 << bits:
                return [struct.pack(f"<I{code}", kind, value)]
        raise ValueError(f"{value} does not fit into 64 bits")
    if isinstance(value, float):
        return [struct.pack("<If", _F32, value)]
    if not isinstance(value, np.ndarray) and value and not isinstance(value[0], str):
        value = np.array(value, {bool: np.bool_, int: np.int32, float: np.float32}[type(value[0])])
    if isinstance(value, np.ndarray):
        values = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<"), copy=False))
        code = f"{values.dtype.kind}{values.dtype.itemsize}"
        if values.ndim != 1 or code not in _ELEMENTS:
            raise ValueError(f"an array of {value.dtype} {list(value.shape)} is no GGUF value")
        return [struct.pack("<IIQ", _ARRAY, _ELEMENTS[code], len(values)), values.tobytes()]
    return [struct.pack("<IIQ", _ARRAY, _STRING, len(value)), *(_string(str(text)) for text in value)]


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
