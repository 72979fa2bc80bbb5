"""GGUF files for tests: a small writer, which knows nothing of the package's own."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2k": 10, "q3k": 11, "q4k": 12, "q5k": 13,
    "q6k": 14, "iq4_nl": 20, "iq3_s": 21, "iq4_xs": 23, "bf16": 30, "mxfp4": 39,
}  # fmt: skip


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """The type and the bytes of a metadata value. Arrays hold what their first element is."""
    if isinstance(item, bool):
        return struct.pack("<IB", BOOL, item)
    if isinstance(item, int):
        return struct.pack("<II", U32, item) if item >= 0 else struct.pack("<Ii", I32, item)
    if isinstance(item, float):
        return struct.pack("<If", F32, item)
    if isinstance(item, str):
        return struct.pack("<I", STRING) + string(item)
    if isinstance(item, bytes):  # type and bytes as they are
        return item
    parts = [value(each) for each in item]
    kind = parts[0][:4] if parts else struct.pack("<I", U32)
    return struct.pack("<I", ARRAY) + kind + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)


def encode(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]], alignment: int = 32
) -> bytes:
    """A file.

    Args:
        metadata: key -> value; bytes are a type and its value as they are in the file.
        tensors: name -> (dims, the contiguous one first; type; bytes).
        alignment: of the tensors; the caller puts it into the metadata.
    """
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, item in metadata.items():
        out += [string(key), value(item)]
    offset = 0
    for name, (dims, kind, data) in tensors.items():
        out += [string(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)]
        offset += -(-len(data) // alignment) * alignment
    header = b"".join(out)
    body = b"".join(data + bytes(-len(data) % alignment) for _, _, data in tensors.values())
    return header + bytes(-len(header) % alignment) + body


def f32(array: Any) -> tuple[tuple[int, ...], int, bytes]:
    """A tensor of plain numbers."""
    array = np.asarray(array, dtype=np.float32)
    return array.shape[::-1], 0, array.tobytes()


def write(path: Path, *parts: Any, **options: Any) -> Path:
    path.write_bytes(encode(*parts, **options))
    return path
