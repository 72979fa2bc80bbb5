"""Importance matrix files for tests: llama.cpp's own, and any that bytes can make."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden"
LEGACY = (GOLDEN / "ggml_legacy.imatrix").read_bytes()
GGUF = (GOLDEN / "ggml_imatrix.gguf").read_bytes()
EXPECTED = json.loads((GOLDEN / "ggml_expected.json").read_text())


def floats(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(torch.float32)


def cimatrix(entries: dict[str, list[float]]) -> bytes:
    out = struct.pack("<Q", len(entries))
    for name, values in entries.items():
        raw = name.encode()
        out += struct.pack("<Q", len(raw)) + raw + struct.pack(f"<Q{len(values)}f", len(values), *values)
    return out


def legacy(entries: list[tuple[bytes, int, list[float]]], trailer: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return out + trailer


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


META = {
    "general.type": (8, gguf_string("imatrix")),
    "imatrix.datasets": (9, struct.pack("<IQ", 8, 1) + gguf_string("a.txt")),
    "imatrix.chunk_count": (4, struct.pack("<I", 2)),
    "imatrix.chunk_size": (4, struct.pack("<I", 8)),
}


def gguf(
    tensors: list[tuple[str, list[int], list[float]]],
    meta: dict[str, tuple[int, bytes]] = META,
    version: int = 3,
    offsets: dict[str, int] | None = None,
    types: dict[str, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file with tensors (name, dims, values) at multiples of the alignment, or at the given offsets."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(meta))
    for key, (kind, value) in meta.items():
        out += gguf_string(key) + struct.pack("<I", kind) + value
    data = b""
    for name, dims, values in tensors:
        offset = (offsets or {}).get(name, len(data))
        out += gguf_string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", (types or {}).get(name, 0), offset)
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % alignment)
    return out + bytes(-len(out) % alignment) + data


PAIR = [("x.in_sum2", [4], [1.0, 2.0, 3.0, 4.0]), ("x.counts", [1], [2.0])]

Write = Callable[[bytes], Path]
