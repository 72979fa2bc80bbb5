"""The GGUF container of whole models: all types of tensors, parts of a file, and damaged files."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isqtorch.files.binary import open_binary
from isqtorch.files.gguf import GgufFile
from isqtorch.files.gguf_model import GgufModel
from isqtorch.formats.gguf_types import GGUF_TYPES
from tests.gguf_files import ARRAY, STRING, U32, encode, f32, string, write

SIZES = {number: (row.block, row.block_bytes) for number, row in GGUF_TYPES.items()}
META: dict[str, Any] = {"general.architecture": "llama"}


def tensor(kind: int, rows: int = 3, blocks: int = 2) -> tuple[tuple[int, ...], int, bytes]:
    block, size = SIZES[kind]
    data = np.random.default_rng(kind).integers(0, 256, rows * blocks * size, dtype=np.uint8)
    return (blocks * block, rows), kind, data.tobytes()


def opened(tmp_path: Path, data: bytes) -> GgufModel:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return GgufModel(path, SIZES)


def test_every_type_is_read_byte_for_byte(tmp_path: Path) -> None:
    tensors = {GGUF_TYPES[kind].name: tensor(kind) for kind in GGUF_TYPES}
    model = opened(tmp_path, encode(META, tensors))
    assert set(model.tensors) == set(tensors)
    for name, (dims, kind, data) in tensors.items():
        found = model.tensors[name]
        assert (found.type, found.shape, found.rows) == (kind, dims[::-1], 3)
        assert model.read(found).tobytes() == data
        assert model.read(found, slice(1, 2)).tobytes() == data[found.row_bytes : 2 * found.row_bytes]
    model.release()
    assert model.read(model.tensors["Q4_K"]).tobytes() == tensors["Q4_K"][2]


def test_metadata_has_types(tmp_path: Path) -> None:
    meta = {
        **META, "flag": True, "off": False, "whole": 7, "less": -3, "real": 0.5, "text": "\u00e9", "flags": [True, False],
        "numbers": [1, 2, 3], "reals": [0.5, 1.5], "texts": ["a", "", "\u2581b"], "none": [],
    }  # fmt: skip
    found = opened(tmp_path, encode(meta, {})).metadata
    assert found["flag"] is True and found["off"] is False
    assert (found["whole"], found["less"], found["real"], found["text"]) == (7, -3, 0.5, "\u00e9")
    assert found["texts"] == ["a", "", "\u2581b"]
    flags, numbers, none = found["flags"], found["numbers"], found["none"]
    assert isinstance(flags, np.ndarray) and flags.dtype == bool and flags.tolist() == [True, False]
    assert isinstance(numbers, np.ndarray) and numbers.tolist() == [1, 2, 3]
    assert isinstance(none, np.ndarray) and not len(none)


def test_texts_longer_than_a_piece_are_read(tmp_path: Path) -> None:
    texts = ["a" * (1 << 20), "b", "c" * ((1 << 20) + 5), "", "d" * 3_000_000, "e"]
    assert opened(tmp_path, encode({**META, "texts": texts}, {})).metadata["texts"] == texts


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    texts = [f"token{number}" for number in range(150_000)]
    data = encode({**META, "tokens": texts, "merges": texts}, {})
    began = time.process_time()
    found = opened(tmp_path, data).metadata
    assert time.process_time() - began < 2
    assert found["tokens"] == texts and found["merges"] == texts


def with_header(tensors: int = 0, entries: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def entry(name: str = "a", dims: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


BODY = bytes(4096)
ARCHITECTURE = string("general.architecture") + struct.pack("<I", STRING) + string("llama")
DAMAGED = {
    "empty": (b"", "does not start with 'GGUF'"),
    "other file": (b"PK\x03\x04" + BODY, "does not start with 'GGUF'"),
    "version": (with_header(version=9), "version 9"),
    "big-endian": (with_header(version=3 << 24), "big-endian"),
    "cut header": (b"GGUF\x03\0", "are left"),
    "too many tensors": (with_header(1 << 40, 0, BODY), "number of tensors"),
    "too many entries": (with_header(0, 1 << 60, BODY), "number of metadata entries"),
    "long key": (with_header(0, 1, struct.pack("<Q", 1 << 62) + BODY), "metadata key"),
    "unknown type": (with_header(0, 1, string("k") + struct.pack("<I", 99) + BODY), "unknown type 99"),
    "long text": (with_header(0, 1, string("k") + struct.pack("<IQ", STRING, 1 << 50) + BODY), "bytes are left"),
    "long array": (with_header(0, 1, string("k") + struct.pack("<IIQ", ARRAY, U32, 1 << 50) + BODY), "bytes are left"),
    "nested array": (with_header(0, 1, string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + BODY), "no known file has"),
    "long text in an array": (
        with_header(0, 1, string("k") + struct.pack("<IIQ", ARRAY, STRING, 2) + string("a") + struct.pack("<Q", 1 << 55) + BODY),
        "bytes are left",
    ),
    "cut array of texts": (
        with_header(0, 1, string("k") + struct.pack("<IIQ", ARRAY, STRING, 3) + string("a") + string("bcdefgh") + b"\x01\0"),
        "are left",
    ),
    "key twice": (with_header(0, 2, ARCHITECTURE * 2), "appears twice"),
    "tensor twice": (with_header(2, 0, entry() + entry() + BODY), "appears twice"),
    "no dims": (with_header(1, 0, entry(dims=()) + BODY), "0 dims"),
    "five dims": (with_header(1, 0, entry(dims=(1,) * 5) + BODY), "5 dims"),
    "empty tensor": (with_header(1, 0, entry(dims=(32, 0)) + BODY), "would lie at"),
    "dims overflow": (with_header(1, 0, entry(dims=(1 << 32, 1 << 32, 1 << 32)) + BODY), "would lie at"),
    "unknown tensor type": (with_header(1, 0, entry(kind=4) + BODY), "type 4, which is none"),
    "part of a block": (with_header(1, 0, entry(dims=(33, 2), kind=8) + BODY), "no whole blocks of 32"),
    "misaligned": (with_header(1, 0, entry(offset=16) + BODY), "multiple of 32"),
    "outside": (with_header(1, 0, entry(offset=1 << 40) + BODY), "would lie at"),
    "offset overflow": (with_header(1, 0, entry(offset=(1 << 64) - 32) + BODY), "would lie at"),
    "overlap": (with_header(2, 0, entry("a") + entry("b", offset=32) + BODY), "overlaps"),
    "same place": (with_header(2, 0, entry("a") + entry("b") + BODY), "overlaps"),
    "alignment": (
        with_header(0, 1, string("general.alignment") + struct.pack("<II", U32, 3) + BODY), "power of two",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_at_once(name: str, tmp_path: Path) -> None:
    data, message = DAMAGED[name]
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as raised:
        opened(tmp_path, data)
    assert time.process_time() - began < 0.2
    assert "x.gguf" in str(raised.value) and len(str(raised.value)) < 500


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    data = encode({**META, "texts": ["a", "b"], "numbers": [1, 2]}, {"a": tensor(8), "b": f32([[1.0, 2.0]])})
    opened(tmp_path, data)
    for end in range(0, len(data) - 32, 7):
        with pytest.raises(ValueError, match="x.gguf"):
            opened(tmp_path, data[:end])


def test_a_file_that_is_replaced_or_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    data = encode(META, {"a": tensor(8, rows=300)})
    model = opened(tmp_path, data)
    (tmp_path / "x.gguf").write_bytes(data[:-1000])
    with pytest.raises(ValueError, match="was replaced or written to"):
        model.read(model.tensors["a"])
    model = opened(tmp_path, data)
    model.read(model.tensors["a"], slice(0, 1))  # open from now on
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match="became shorter"):
        model.read(model.tensors["a"])


def test_a_pipe_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        GgufModel(tmp_path, SIZES)
    with pytest.raises(FileNotFoundError):
        GgufModel(tmp_path / "no.gguf", SIZES)


# ---- parts -----------------------------------------------------------------------------------------------------------


def parts(tmp_path: Path, number_of: int = 3, **changes: Any) -> list[Path]:
    """A model in parts, each with one tensor. `changes` are {name of a key without "split.": value} of part 2."""
    paths = []
    for number in range(number_of):
        meta = {"split.no": number, "split.count": number_of, "split.tensors.count": number_of}
        if number == 1:
            meta |= {f"split.{key.replace('_', '.')}": value for key, value in changes.items()}
        meta = {**META, **meta} if number == 0 else meta
        path = tmp_path / f"model-{number + 1:05}-of-{number_of:05}.gguf"
        paths.append(write(path, meta, {f"t{number}": tensor(8, rows=number + 1)}))
    return paths


@pytest.mark.parametrize("given", [0, 2])
def test_all_parts_are_found_from_any_of_them(given: int, tmp_path: Path) -> None:
    paths = parts(tmp_path)
    model = GgufModel(paths[given], SIZES)
    assert model.files == tuple(map(str, paths)) and model.where == str(paths[0])
    assert model.metadata["general.architecture"] == "llama"
    for number in range(3):
        assert model.read(model.tensors[f"t{number}"]).tobytes() == tensor(8, rows=number + 1)[2]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="has 3 parts, and 1 are not in this folder: model-00002-of-00003.gguf"):
        GgufModel(paths[0], SIZES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no": 2}, r"says that it is part 3 of 3 .* part 2 of 3"),
        ({"count": 4}, "part 2 of 4"),
        ({"no": "x"}, "says that it is part 'x'"),
        ({"tensors_count": 5}, "differs from the first part's"),
    ],
)
def test_a_part_of_another_model_is_noticed(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    paths = parts(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        GgufModel(paths[0], SIZES)


def test_a_renamed_part_is_noticed(tmp_path: Path) -> None:
    path = parts(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"part 1 of 3 .* its name says a whole file"):
        GgufModel(path, SIZES)


def test_a_tensor_in_two_parts_and_a_missing_tensor_are_noticed(tmp_path: Path) -> None:
    paths = parts(tmp_path, number_of=2)
    write(paths[1], {"split.no": 1, "split.count": 2, "split.tensors.count": 2}, {"t0": tensor(8)})
    with pytest.raises(ValueError, match="in another part too"):
        GgufModel(paths[0], SIZES)
    write(paths[1], {"split.no": 1, "split.count": 2, "split.tensors.count": 2}, {})
    with pytest.raises(ValueError, match="the 2 parts have 1 tensors"):
        GgufModel(paths[0], SIZES)


def test_absurd_numbers_of_parts_are_refused(tmp_path: Path) -> None:
    for name in ("m-00001-of-99999.gguf", "m-00005-of-00003.gguf", "m-00000-of-00003.gguf"):
        path = write(tmp_path / name, META, {})
        with pytest.raises(ValueError, match="is impossible"):
            GgufModel(path, SIZES)


def test_the_reader_of_importance_matrices_refuses_other_types(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", META, {"a": tensor(8)})
    with open_binary(path) as reader:
        file = GgufFile(reader)
        with pytest.raises(ValueError, match=r"type 8, must be 0 \(f32\)"):
            file.read_f32(file.tensors.values())
