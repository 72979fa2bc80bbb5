"""Importance matrix files that are damaged: each fault has a message that names the file and the place."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from imatrix_files import EXPECTED, GGUF, LEGACY, META, PAIR, Write, cimatrix, gguf, gguf_string, legacy

from isqtorch.importance.imatrix import read_imatrix


def test_missing_file_and_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_imatrix(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a regular file"):
        read_imatrix(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_imatrix(tmp_path / "pipe")


def moved(name: str, offset: int) -> bytes:
    return gguf(PAIR, offsets={name: offset})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "number of entries needs 4 bytes, 0 are left"),
        (b"\x01", "needs 4 bytes"),
        (b"# a text file, not a matrix\n", "number of entries is .*legacy"),
        (bytes(8), "number of entries is 0.*cimatrix"),
        (struct.pack("<Q", 1 << 31) + bytes(100), "but only 100 bytes are left"),
        (cimatrix({"a": [1.0]}) + b"x", "1 bytes follow the last entry"),
        (cimatrix({"a": [1.0, -1.0]}), "entry 'a': value 1 is -1"),
        (
            struct.pack("<Q", 1) + gguf_string("a") + struct.pack("<Q", 1 << 62) + bytes(8),
            "number of values of entry 'a'",
        ),
        (
            struct.pack("<Q", 2) + 2 * (gguf_string("a") + struct.pack("<Qf", 1, 1.0)),
            "byte 29: entry 'a' appears twice",
        ),
        (struct.pack("<QQ", 1, 2000) + b"a" * 3000, "length of the name of entry 0 is 2000, the limit is 1024"),
        (legacy([(b"\xff\xfe", 1, [1.0])]), "name of entry 0 is not UTF-8"),
        (legacy([(b"a\x00b", 1, [1.0])]), "unprintable"),
        (legacy([(b"a", -1, [1.0])]), "calls of 'a' is -1"),
        (legacy([(b"a", 1, [])]), "is 0, must be 1 or more|but only"),
        (legacy([(b"a", 1, [1.0]), (b"a", 1, [1.0])]), "appears twice"),
        (legacy([(b"a", 1, [float("nan")])]), "value 0 is nan"),
        (legacy([(b"a", 1, [1.0])], b"\x01\x00"), "number of the last chunk needs 4 bytes, 2 are left"),
        (legacy([(b"a", 1, [1.0])], struct.pack("<ii", 3, -5)), "dataset is -5"),
        (legacy([(b"a", 1, [1.0])], struct.pack("<ii", 3, 5) + b"abc"), "dataset is 5, but only 3"),
        (b"GGUF", "version needs 4 bytes"),
        (gguf(PAIR, version=1), "GGUF version 1, only 2 and 3"),
        (gguf(PAIR, version=3 << 24), "big-endian"),
        (gguf(PAIR, {**META, "general.type": (8, gguf_string("model"))}), "'general.type' is 'model'"),
        (gguf(PAIR, {key: META[key] for key in list(META)[:-1]}), "'imatrix.chunk_size' must be"),
        (gguf(PAIR, {**META, "imatrix.chunk_count": (6, struct.pack("<f", 2))}), "'imatrix.chunk_count' must be"),
        (gguf(PAIR, {**META, "imatrix.datasets": (8, gguf_string("a"))}), "'imatrix.datasets' must be"),
        (gguf(PAIR, {**META, "general.alignment": (4, struct.pack("<I", 24))}), "alignment' is 24"),
        (gguf(PAIR, {**META, "general.alignment": (4, struct.pack("<I", 1 << 21))}), "alignment' is 2097152"),
        (gguf(PAIR, {**META, "k": (99, b"")}), "'k' has unknown type 99"),
        (gguf(PAIR, {**META, "k": (9, struct.pack("<IQ", 9, 1))}), "array with elements of type 9"),
        (
            gguf(PAIR, {**META, "k": (9, struct.pack("<IQ", 10, 1 << 60))}),
            "length of metadata 'k' is 1152921504606846976",
        ),
        (gguf(PAIR, {**META, "k": (8, struct.pack("<Q", 1 << 63))}), "length of metadata 'k'"),
        (gguf([]), "there are no entries"),
        (gguf(PAIR[:1]), "tensor 'x.counts' is missing"),
        (gguf(PAIR[1:]), "tensor 'x.in_sum2' is missing"),
        (gguf([*PAIR, PAIR[0]]), "tensor 'x.in_sum2' appears twice"),
        (gguf(PAIR, types={"x.in_sum2": 1}), "has type 1, must be 0"),
        (gguf([("x.in_sum2", [1, 1, 1, 1, 4], [0.0] * 4), PAIR[1]]), "has 5 dims"),
        (gguf([("x.in_sum2", [], [0.0] * 4), PAIR[1]]), "has 0 dims"),
        (gguf([("x.in_sum2", [0], []), PAIR[1]]), "would lie at"),
        (gguf([("x.in_sum2", [1 << 62], []), PAIR[1]]), "would lie at"),
        (gguf([("x.in_sum2", [1 << 32, 1 << 32], []), ("x.counts", [1, 1 << 32], [])]), "would lie at"),
        (gguf([("x.in_sum2", [2, 2], [0.0] * 4), PAIR[1]]), r"\[2, 2\] and 'x.counts' \[1\] must have shapes"),
        (gguf([("x.in_sum2", [2, 2], [0.0] * 4), ("x.counts", [2], [0.0] * 2)]), "must have shapes"),
        (gguf([("x.in_sum2", [1, 1, 4], [0.0] * 4), ("x.counts", [1, 1, 4], [0.0] * 4)]), "must have shapes"),
        (moved("x.in_sum2", 4), "offset 4, must be a multiple of 32"),
        (moved("x.in_sum2", 1 << 63), "would lie at"),
        (moved("x.counts", 0), "overlaps"),
        (gguf([PAIR[0], ("x.counts", [1], [-1.0])]), "count 0 is -1"),
        (gguf([PAIR[0], ("x.counts", [1], [float("nan")])]), "count 0 is nan"),
        (gguf([PAIR[0], ("x.counts", [1], [3e38])]), "count 0 is 3e"),
        (gguf([("x.in_sum2", [1], [float("inf")]), PAIR[1]]), "entry 'x': value 0 is inf"),
        (gguf([(".in_sum2", [1], [1.0]), (".counts", [1], [1.0])]), "name of an entry"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}-bytes",
)
def test_damaged(write: Write, data: bytes, message: str) -> None:
    path = write(data)
    with pytest.raises(ValueError, match=message) as error:
        read_imatrix(path)
    assert str(path) in str(error.value)


def test_truncated_anywhere(write: Write) -> None:
    """Shorter files are refused, except where what is cut off is optional or padding."""
    header = 4 + sum(4 + len(name) + 8 + 4 * len(want["stored"]) for name, want in EXPECTED["legacy"].items())
    padding = len(GGUF) - len(GGUF.rstrip(b"\0"))
    for data, accepted in ((LEGACY, {header}), (GGUF, range(len(GGUF) - padding, len(GGUF)))):
        for length in (*range(0, len(data), 5), header, len(data) - padding - 1, len(data) - 1):
            try:
                imatrix = read_imatrix(write(data[:length]))
            except ValueError:
                continue
            assert length in accepted and len(imatrix) == 6, length
