"""A model in the GGUF container: one file, or parts of one that was split, with all tensors checked.

The name of a part is NAME-00001-of-00003.gguf. The first part has the metadata. Every part has a directory and data of
its own, and says which part it is (split.no, from 0), how many there are, and how many tensors all of them have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .binary import BinaryReader, open_binary
from .gguf import MAGIC, GgufFile, Value

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 1000
_TOTAL = "split.tensors.count"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the model. Its place was checked: it lies inside of its file, and overlaps no other one."""

    name: str
    shape: tuple[int, ...]  # rows before columns: the contiguous dimension last
    type: int
    part: int  # number of the file
    start: int  # first byte
    nbytes: int

    @property
    def rows(self) -> int:
        """The number of rows in all matrices."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


class GgufModel:
    """The metadata and the tensors of a model.

    Attributes:
        where: the file, or the first part, for messages.
        files: absolute paths of all parts.
        metadata: all keys and values of the first part.
        tensors: {name: tensor}, of all parts.
    """

    def __init__(self, path: str | os.PathLike[str], sizes: Mapping[int, tuple[int, int]]) -> None:
        """Read the headers.

        Args:
            path: the file, or any of its parts.
            sizes: {type of a tensor: (elements of a block, bytes of a block)}.

        Raises:
            ValueError: a file is malformed, or is no part of the model.
            OSError: a file is missing or cannot be read.
        """
        paths = _parts(Path(path).expanduser())
        self.where = str(paths[0])
        self.files = tuple(os.path.abspath(part) for part in paths)
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._marks: list[tuple[int, int, int]] = []
        self._stack = ExitStack()
        self._open: dict[int, BinaryReader] = {}
        for number, part in enumerate(paths):
            with open_binary(part) as reader:
                if reader.remaining < 4 or reader.take(4, "magic") != MAGIC:
                    raise reader.error("not a GGUF file: it does not start with 'GGUF'", 0)
                reader.seek(0)
                file = GgufFile(reader)
                self._check_part(reader, file, number, len(paths))
                self._marks.append(_mark(part))
                for tensor, (start, end) in file.placed(file.tensors.values(), sizes).items():
                    if tensor.name in self.tensors:
                        raise reader.error(f"tensor {tensor.name!r} is in another part too", tensor.at)
                    self.tensors[tensor.name] = StoredTensor(
                        tensor.name, tensor.dims[::-1], tensor.type, number, start, end - start
                    )
        total = self.metadata.get(_TOTAL)
        if total is not None and total != len(self.tensors):
            raise ValueError(
                f"{self.where}: {_TOTAL} is {total!r:.40}, and the {len(paths)} parts have {len(self.tensors)} tensors. A part is "
                "of another file."
            )

    def _check_part(self, reader: BinaryReader, file: GgufFile, number: int, parts: int) -> None:
        """Take over the metadata of the first part, and check what the others say about themselves."""
        stated = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1)
        if stated[1] in (0, 1) and parts == 1:
            stated = (0, 1)
        if stated != (number, parts):
            named = f"part {number + 1} of {parts}" if parts > 1 else "a whole file"
            raise reader.error(
                f"says that it is part {_counted(stated[0])} of {stated[1]!r:.20} (split.no, split.count), and its name says {named}. "
                "The parts must have the names that llama.cpp gave them, NAME-00001-of-00003.gguf.",
                0,
            )
        if number == 0:
            self.metadata = file.metadata
        elif file.metadata.get(_TOTAL) != self.metadata.get(_TOTAL):
            raise reader.error(f"{_TOTAL} differs from the first part's: it is a part of another file", 0)

    def read(self, tensor: StoredTensor, rows: slice | None = None) -> NDArray[np.uint8]:
        """The bytes of a tensor, in memory of its own.

        Args:
            tensor: one of `tensors`.
            rows: read only these rows; consecutive ones. None: all.

        Returns:
            uint8 `[rows, row_bytes]`, the rows of all matrices one after the other.

        Raises:
            ValueError: the file was changed after it was opened.
            OSError: the file cannot be read.
        """
        first, end, _ = (rows or slice(None)).indices(tensor.rows)
        reader = self._reader(tensor.part)
        reader.seek(tensor.start + first * tensor.row_bytes)
        values = np.empty((end - first, tensor.row_bytes), dtype=np.uint8)
        if values.size:
            reader.fill(values.data.cast("B"), f"tensor {tensor.name!r}")
        return values

    def release(self) -> None:
        """Close the files. They are opened again when needed."""
        self._open.clear()
        self._stack.close()

    def _reader(self, part: int) -> BinaryReader:
        if part not in self._open:
            path = self.files[part]
            reader = self._stack.enter_context(open_binary(path))
            if _mark(path) != self._marks[part]:
                raise ValueError(f"{path}: was replaced or written to after it was opened. Open it again.")
            self._open[part] = reader
        return self._open[part]


def _parts(path: Path) -> list[Path]:
    """All parts of the file that this path is a part of; the path alone if its name is not that of a part."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count <= _MOST_PARTS:
        raise ValueError(
            f"{path}: part {int(match[2])} of {count} is impossible; at most {_MOST_PARTS} parts can be read"
        )
    paths = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        raise FileNotFoundError(
            f"{path}: the model has {count} parts, and {len(missing)} are not in this folder: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}"
        )
    return paths


def _mark(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """What changes when a file is replaced or written to."""
    state = os.stat(path)
    return state.st_ino, state.st_size, state.st_mtime_ns


def _counted(number: object) -> str:
    return str(number + 1) if isinstance(number, int) else f"{number!r:.20}"
