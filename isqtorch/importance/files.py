"""Read and write the three kinds of importance matrix files. Every number of a file is checked when it is read.

    llama.cpp, GGUF       f32 tensors "<name>.in_sum2" [K] or [E, K] (sums) and "<name>.counts" [1] or [E] (tokens)
    llama.cpp, legacy     i32 n | n x (i32 length, name | i32 ncall | i32 nval | f32 sums[nval]) | optional trailer:
                          i32 last_chunk | i32 length, dataset        weights = sums / ncall, experts one after another
    mistral.rs .cimatrix  u64 n | n x (u64 length, name | u64 nval | f32 weights[nval])

A file is recognised by its content. The last two have no magic number, but they differ in bytes 4 to 7: in a legacy
file these are the length of the first name, which is not 0; in a .cimatrix they are the upper half of the number of
entries, which is 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isqtorch.files.binary import BinaryReader
from isqtorch.files.gguf import MAGIC, GgufFile, GgufTensor
from isqtorch.files.gguf_writing import Entry, Value, encode_header

KINDS = {
    "gguf": "a GGUF importance matrix",
    "legacy": "a legacy llama.cpp importance matrix",
    "cimatrix": "a mistral.rs .cimatrix",
}
DEFAULT_CHUNK = 512  # tokens; llama.cpp's

_MAX_ENTRIES = 1 << 17  # far above any real file, quick to loop over
_SUMS, _COUNTS = ".in_sum2", ".counts"
_GGUF_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


@dataclass
class Content:
    """The content of a file. `Imatrix` has the same attributes and documents them."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    format: str | None = None
    chunk_count: int | None = None
    chunk_size: int | None = None
    datasets: tuple[str, ...] = ()


def detect(reader: BinaryReader) -> str:
    """Return the kind of a file, a key of `KINDS`, from its first bytes."""
    head = reader.take(min(8, reader.size), "start of the file")
    reader.seek(0)
    if head[:4] == MAGIC:
        return "gguf"
    return "cimatrix" if head[4:] == bytes(4) else "legacy"


def read(reader: BinaryReader, kind: str) -> Content:
    """Read a whole file. Raise ValueError if its structure is wrong; `Imatrix` checks the values."""
    return {"gguf": _read_gguf, "legacy": _read_legacy, "cimatrix": _read_cimatrix}[kind](reader)


def encode(content: Content, kind: str) -> Iterator[bytes]:
    """Yield the bytes of a file of this kind in pieces.

    Raises:
        ValueError: this kind of file cannot hold a name or value of `content`.
    """
    return {"gguf": _encode_gguf, "legacy": _encode_legacy, "cimatrix": _encode_cimatrix}[kind](content)


# ---- the two formats without a magic ---------------------------------------------------------------------------------


def _read_legacy(reader: BinaryReader) -> Content:
    out = Content(format="legacy")
    for _ in range(reader.count("i32", "number of entries", 17, _MAX_ENTRIES, least=1)):
        name = _new_name(reader, "i32", out.sums)
        calls = reader.integer("i32", f"number of calls of {name!r}")
        if calls < 0:
            raise reader.error(f"number of calls of {name!r} is {calls}, must not be negative", reader.position - 4)
        out.counts[name] = torch.tensor([max(calls, 1)])  # if it is 0, llama.cpp does not divide the values
        out.sums[name] = _values(reader, "i32", name)
    if reader.remaining:
        out.chunk_count = reader.integer("i32", "number of the last chunk")
        dataset = reader.text("i32", "name of the dataset")
        out.datasets = (dataset,) if dataset else ()
    _expect_end(reader)
    return out


def _encode_legacy(content: Content) -> Iterator[bytes]:
    names = _with_data(content)
    yield struct.pack("<i", len(names))
    for name in names:
        calls, values = _legacy_values(content, name)
        yield _string("<i", name) + struct.pack("<ii", calls, values.size) + values.tobytes()
    if content.chunk_count is not None or content.datasets:
        yield struct.pack("<i", content.chunk_count or 0) + _string("<i", (content.datasets or ("",))[-1])


def _legacy_values(content: Content, name: str) -> tuple[int, NDArray[np.float32]]:
    """Return the number of calls and the stored values of an entry: mean times calls. A call is a chunk of tokens."""
    sums, counts = _matrices(content, name)
    if content.format == "legacy":
        return int(counts[0]), sums.reshape(-1)
    chunk = content.chunk_size or DEFAULT_CHUNK
    calls = ceil(int(counts.max()) / chunk)
    divisor = np.maximum(counts, 1).astype(np.float32)[:, None]
    with np.errstate(over="ignore"):
        scaled = sums / divisor * np.float32(calls)
    scaled = np.where(counts[:, None] == calls, sums, scaled)  # the same value, but not rounded twice
    scaled = np.where(counts[:, None] > 0, scaled, np.float32(calls))
    if not np.isfinite(scaled).all():
        raise ValueError(f"the values of {name!r} are too large for this kind of file")
    return calls, scaled.reshape(-1)


def _read_cimatrix(reader: BinaryReader) -> Content:
    out = Content(format="cimatrix")
    for _ in range(reader.count("u64", "number of entries", 21, _MAX_ENTRIES, least=1)):
        name = _new_name(reader, "u64", out.sums)
        out.sums[name] = _values(reader, "u64", name)
    _expect_end(reader)
    return out


def _encode_cimatrix(content: Content) -> Iterator[bytes]:
    names = _with_data(content)
    yield struct.pack("<Q", len(names))
    for name in names:
        sums, counts = _matrices(content, name)
        means = sums / np.maximum(counts, 1).astype(np.float32)[:, None]
        means = np.where(counts[:, None] > 0, means, np.float32(0))  # as mistral.rs marks experts without data
        yield _string("<Q", name) + struct.pack("<Q", means.size) + means.tobytes()


def _new_name(reader: BinaryReader, kind: str, seen: Mapping[str, object]) -> str:
    at = reader.position
    name = reader.name(kind, f"name of entry {len(seen)}")
    if name in seen:
        raise reader.error(f"entry {name!r} appears twice", at)
    return name


def _values(reader: BinaryReader, kind: str, name: str) -> Tensor:
    what = f"values of entry {name!r}"
    return torch.from_numpy(reader.floats(reader.count(kind, f"number of {what}", item_bytes=4, least=1), what))


def _expect_end(reader: BinaryReader) -> None:
    if reader.remaining:
        raise reader.error(f"{reader.remaining} bytes follow the last entry")


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _read_gguf(reader: BinaryReader) -> Content:
    file = GgufFile(reader)
    content = file.metadata.get("general.type")
    if content != "imatrix":
        raise reader.error(f"metadata 'general.type' is {content!r:.80}, must be 'imatrix'")
    datasets, chunk_count, chunk_size = (file.metadata.get(key) for key in _GGUF_KEYS)
    if not isinstance(datasets, list):
        raise reader.error(f"metadata {_GGUF_KEYS[0]!r} must be a list of strings, is {datasets!r:.80}")
    if not isinstance(chunk_count, int) or chunk_count < 0:
        raise reader.error(f"metadata {_GGUF_KEYS[1]!r} must be a number of chunks, is {chunk_count!r:.80}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise reader.error(f"metadata {_GGUF_KEYS[2]!r} must be a number of tokens, is {chunk_size!r:.80}")

    pairs = _gguf_pairs(reader, file)
    values = file.read_f32(tensor for pair in pairs.values() for tensor in pair)
    out = Content({}, {}, "gguf", chunk_count, chunk_size, tuple(datasets))
    for name, (sum_info, count_info) in pairs.items():
        columns, experts = sum_info.dims[0], values[count_info.name].size
        shape = (experts, columns) if experts > 1 else (columns,)
        out.sums[name] = torch.from_numpy(values.pop(sum_info.name)).reshape(shape)
        out.counts[name] = _token_counts(reader, count_info, values.pop(count_info.name))
    return out


def _gguf_pairs(reader: BinaryReader, file: GgufFile) -> dict[str, tuple[GgufTensor, GgufTensor]]:
    """Return {name of a weight: directory entries of its sums and counts}. Ignore other tensors, as llama.cpp does."""
    tensors = file.tensors
    pairs = {}
    for name in dict.fromkeys(full.rpartition(".")[0] for full in tensors if full.endswith((_SUMS, _COUNTS))):
        sums, counts = tensors.get(name + _SUMS), tensors.get(name + _COUNTS)
        if sums is None or counts is None:
            raise reader.error(f"tensor {name + (_SUMS if sums is None else _COUNTS)!r} is missing")
        # Trailing dims of 1 are not stored: [K, 1] is [K].
        rows = (sums.dims[1:] + (1, 1, 1))[:3]
        if counts.dims[0] != 1 or (counts.dims[1:] + (1, 1, 1))[:3] != rows or rows[1:] != (1, 1):
            raise reader.error(
                f"tensors {sums.name!r} {list(sums.dims)} and {counts.name!r} {list(counts.dims)} must have shapes "
                "[columns, experts] and [1, experts]",
                sums.at,
            )
        pairs[name] = sums, counts
    if not pairs:
        raise reader.error("there are no entries")
    return pairs


def _token_counts(reader: BinaryReader, info: GgufTensor, values: NDArray[np.float32]) -> Tensor:
    """Convert token counts, which are stored as f32 `[E]`, to int64."""
    bad = ~((values >= 0) & (values < 2.0**62))  # NaN too
    if bad.any():
        position = int(bad.argmax())
        raise reader.error(f"tensor {info.name!r}: count {position} is {values[position]:g}", info.at)
    return torch.from_numpy(np.rint(values).astype(np.int64))


def _encode_gguf(content: Content) -> Iterator[bytes]:
    """Encode a file as llama.cpp does. If the number or size of the chunks is unknown, write 0 chunks of 1 token."""
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        "imatrix.datasets": list(content.datasets),
        "imatrix.chunk_count": content.chunk_count or 0,
        "imatrix.chunk_size": content.chunk_size or 1,
    }
    tensors: dict[str, NDArray[np.float32]] = {}
    for name in _sorted(content.sums):
        tensors[name + _SUMS], counts = _matrices(content, name)
        tensors[name + _COUNTS] = counts.astype(np.float32)[:, None]
    yield encode_header(metadata, [Entry(name, value.shape[::-1], value.nbytes) for name, value in tensors.items()])
    for value in tensors.values():
        yield value.tobytes() + bytes(-value.nbytes % 32)


# ---- both ------------------------------------------------------------------------------------------------------------


def _matrices(content: Content, name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return sums `[E, K]` and counts `[E]` of an entry; E = 1 if the entry has one count for all experts."""
    counts = content.counts[name].numpy()
    return content.sums[name].contiguous().numpy().astype("<f4", copy=False).reshape(len(counts), -1), counts


def _with_data(content: Content) -> list[str]:
    """Return the names of the entries with a count above 0. llama.cpp leaves out the others, too."""
    names = [name for name in _sorted(content.sums) if content.counts[name].any()]
    if not names:
        raise ValueError("no entry of the importance matrix has data: there is nothing to save")
    return names


def _sorted(names: Mapping[str, object]) -> list[str]:
    """Sort names by their UTF-8 bytes, as C++ does."""
    return sorted(names, key=str.encode)


def _string(length: str, text: str) -> bytes:
    raw = text.encode()
    return struct.pack(length, len(raw)) + raw
