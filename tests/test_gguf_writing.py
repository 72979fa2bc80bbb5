"""The writer of GGUF files: a reader by other people finds what was written, and nothing half-written remains."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from isqtorch.files.gguf_writing import Entry, Value, encode_header, write_gguf

METADATA: dict[str, Value] = {
    "general.architecture": "test",
    "a.bool": True,
    "a.small": 7,
    "a.negative": -7,
    "a.large": 1 << 40,
    "a.very_negative": -(1 << 40),
    "a.float": 0.1,
    "a.text": "ä\n",
    "a.empty": [],
    "a.texts": ["x", "", "日本"],
    "a.flags": [True, False],
    "a.numbers": [1, -2],
    "a.floats": [0.5, -2.0],
    "a.bytes": np.frombuffer(b"\x00\xff", np.uint8),
    "a.big_endian": np.array([1.5, 2.5], ">f4"),
}


def entry(name: str, values: np.ndarray, type: int = 0) -> Entry:
    raw = values.tobytes()
    return Entry(name, values.shape[::-1], len(raw), type, lambda: [raw[:3], raw[3:]])


def test_another_reader_finds_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vector, matrix = rng.random(5, np.float32), rng.random((3, 4), np.float32)
    stack = rng.random((2, 3, 4)).astype(np.float16)
    blocks = rng.integers(0, 256, (3, 2 * 34), np.uint8)
    packed = Entry("packed", (64, 3), blocks.nbytes, 8, lambda: [memoryview(blocks.reshape(-1))])
    tensors = [entry("vector", vector), entry("matrix", matrix), entry("stack", stack, 1), packed]
    write_gguf(tmp_path / "x.gguf", METADATA, tensors)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in METADATA.items():
        if key != "a.empty":  # in which that reader fails
            got = reader.fields[key].contents()
            if isinstance(value, float):
                got, value = np.float32(got), np.float32(value)
            assert got == (value.tolist() if isinstance(value, np.ndarray) else value), key
    types = {key: [kind.name for kind in reader.fields[key].types] for key in METADATA}
    assert types["a.small"] == ["UINT32"] and types["a.negative"] == ["INT32"] and types["a.bool"] == ["BOOL"]
    assert types["a.large"] == ["UINT64"] and types["a.very_negative"] == ["INT64"] and types["a.float"] == ["FLOAT32"]
    assert types["a.flags"] == ["ARRAY", "BOOL"] and types["a.bytes"] == ["ARRAY", "UINT8"]
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert np.array_equal(found["vector"].data, vector) and np.array_equal(found["matrix"].data, matrix)
    assert np.array_equal(found["stack"].data, stack) and np.array_equal(found["packed"].data, blocks)
    assert found["packed"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert (tmp_path / "x.gguf").stat().st_size % 32 == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([Entry("a", (1,), 4), Entry("a", (1,), 4)], "two tensors have the name 'a'"),
        ([Entry("é" * 32, (1,), 4)], "more than 63 bytes"),
        ([Entry("a", (2, 2, 2, 2, 2), 128)], "1 to 4"),
        ([Entry("a", (2, 0), 0)], "none is 0"),
    ],
)
def test_what_no_file_can_hold(tensors: list[Entry], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_header({}, tensors)


@pytest.mark.parametrize(
    ("value", "message"),
    [(1 << 64, "64 bits"), (np.zeros((2, 2)), "no GGUF value"), (np.zeros(2, complex), "no GGUF value")],
)
def test_values_that_no_file_can_hold(value: Value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_header({"key": value}, [])


def full(code: int = errno.ENOSPC) -> Iterator[bytes]:
    yield b"1234"
    raise OSError(code, "No space left on device")


@pytest.mark.parametrize("before", [None, b"the old file"])
def test_after_an_error_nothing_has_changed(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "x.gguf"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(OSError, match="No space left on device: '.*x.gguf'"):
        write_gguf(path, {}, [Entry("a", (2,), 8, read=full)])
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else ["x.gguf"])
    assert before is None or path.read_bytes() == before
