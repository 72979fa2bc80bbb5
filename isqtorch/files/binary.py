"""Bounded reading of untrusted files.

Every length in a file is checked against the remaining bytes before it is used. Only regular files are read: a pipe
or a device has no size, and may never end.

Files are read and not mapped: if another process truncates a mapped file, SIGBUS kills this process. A read only
returns fewer bytes.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_NAME_BYTES = 1024
_TEXT_BYTES = 1 << 20  # read at once by `texts`
MAX_TEXT_BYTES = 1 << 30  # texts for calibration and evaluation

_SCALARS = {
    "u8": struct.Struct("<B"),
    "i8": struct.Struct("<b"),
    "u16": struct.Struct("<H"),
    "i16": struct.Struct("<h"),
    "u32": struct.Struct("<I"),
    "i32": struct.Struct("<i"),
    "u64": struct.Struct("<Q"),
    "i64": struct.Struct("<q"),
    "f32": struct.Struct("<f"),
    "f64": struct.Struct("<d"),
}


class BinaryReader:
    """A little-endian file and a position in it. Methods that read take `what`, the name of the value for messages.

    No method allocates more than the bytes it returns. No method returns more bytes than the file holds.
    """

    def __init__(self, path: str, file: BufferedReader, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file

    @property
    def remaining(self) -> int:
        return self.size - self.position

    def error(self, message: str, at: int | None = None) -> ValueError:
        """Make the exception to raise. It names the file, the byte (`at`, or the position) and the fault."""
        return ValueError(f"{self.path}: byte {self.position if at is None else at}: {message}")

    def require(self, nbytes: int, what: str) -> None:
        """Raise ValueError unless `nbytes` more bytes are left."""
        if nbytes > self.remaining:
            raise self.error(f"{what} needs {nbytes} bytes, {self.remaining} are left in the file")

    @staticmethod
    def width(kind: str) -> int:
        """Return the size in bytes of one number of `kind`."""
        return _SCALARS[kind].size

    def seek(self, position: int) -> None:
        assert 0 <= position <= self.size
        self.position = position
        self._file.seek(position)

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        data = self._file.read(count)
        if len(data) != count:
            raise self.error(f"{what}: the file became shorter while it was read")
        self.position += count
        return data

    def integer(self, kind: str, what: str) -> int:
        """Read one integer; `kind` is "u8", "i32", "u64", ..."""
        return int(self.scalar(kind, what))

    def scalar(self, kind: str, what: str) -> int | float:
        """Read one number; `kind` is "u8", "i32", "u64", "f32", ..."""
        unpacker = _SCALARS[kind]
        value: int | float = unpacker.unpack(self.take(unpacker.size, what))[0]
        return value

    def count(self, kind: str, what: str, item_bytes: int, most: int | None = None, least: int = 0) -> int:
        """Read the number of items that follow.

        It must be `least` to `most`, and at least `item_bytes` bytes per item must be left in the file.
        """
        at = self.position
        value = self.integer(kind, what)
        if value < least:
            raise self.error(f"{what} is {value}, must be {least} or more", at)
        if value * item_bytes > self.remaining:
            raise self.error(f"{what} is {value}, but only {self.remaining} bytes are left in the file", at)
        if most is not None and value > most:
            raise self.error(f"{what} is {value}, the limit is {most}", at)
        return value

    def name(self, kind: str, what: str) -> str:
        """Read a length of `kind` and that many bytes of UTF-8: 1 to 1024 bytes of printable characters."""
        at = self.position
        length = self.count(kind, f"length of the {what}", 1, MAX_NAME_BYTES, least=1)
        raw = self.take(length, what)
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the {what} is not UTF-8: {raw[:40]!r}", at) from None
        if not name.isprintable():
            raise self.error(f"the {what} has unprintable characters: {name[:40]!r}", at)
        return name

    def text(self, kind: str, what: str) -> str:
        """Read a length of `kind` and that many bytes of text; bytes that are not UTF-8 are replaced."""
        length = self.count(kind, f"length of {what}", item_bytes=1)
        return self.take(length, what).decode("utf-8", errors="replace")

    def texts(self, kind: str, count: int, what: str) -> list[str]:
        """Read `count` texts, each after its length of `kind`. Much quicker than one by one.

        The bytes are read in large pieces. A piece that ends inside a text is followed by one that starts there.
        """
        width, unpack = self.width(kind), _SCALARS[kind].unpack_from
        found: list[str] = []
        piece = _TEXT_BYTES
        while len(found) < count:
            start = self.position
            data = self.take(min(piece, self.remaining), what)
            at, size, before = 0, len(data), len(found)
            while len(found) < count and at + width <= size:
                end = at + width + unpack(data, at)[0]
                if end > size:
                    break
                found.append(data[at + width : end].decode("utf-8", "replace"))
                at = end
            self.seek(start + at)
            if len(found) < count and len(found) == before:  # the next text is longer than the piece, or the file ends
                length = self.count(kind, f"length of {what}", 1)
                piece = max(piece, width + length)
                self.seek(start + at)
        return found

    def floats(self, count: int, what: str) -> NDArray[np.float32]:
        """Read `count` f32 values directly into the returned array."""
        return self.numbers("f32", count, what)

    def numbers(self, kind: str, count: int, what: str) -> NDArray[Any]:
        """Read `count` numbers of `kind` directly into the returned array."""
        self.require(self.width(kind) * count, what)
        values = np.empty(count, dtype=np.dtype(_SCALARS[kind].format))
        if count:
            self.fill(values.data.cast("B"), what)
        return values

    def fill(self, target: memoryview, what: str) -> None:
        """Read as many bytes as the target has, directly into it."""
        self.require(len(target), what)
        if self._file.readinto(target) != len(target):
            raise self.error(f"{what}: the file became shorter while it was read")
        self.position += len(target)


def regular(path: str | os.PathLike[str]) -> str:
    """Return the path as a string, after a check that it is a regular file. Opening a pipe would wait for its writer.

    Raises:
        FileNotFoundError, PermissionError, ...: as `os.stat` does.
        ValueError: the path is a directory, pipe, socket or device.
    """
    name = os.fspath(path)
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ValueError(f"{name}: not a regular file")
    return name


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """Open a regular file for reading. Raise as `regular` and `open` do."""
    name = regular(path)
    # O_NONBLOCK: the file may become a pipe after the check. It has no effect on regular files.
    descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{name}: not a regular file")
        yield file


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a whole regular file of at most `most` bytes.

    Raises:
        OSError: as `open` does.
        ValueError: the path is not a regular file, or the file is larger.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{os.fspath(path)} is larger than {most} bytes, the limit for a file of this kind")
    return data


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a regular file of UTF-8 text. Line ends become newlines, as in text mode.

    Raises:
        OSError: as `open` does.
        ValueError: the path is not a regular file, or the file is not UTF-8 or larger than `MAX_TEXT_BYTES`.
    """
    try:
        text = read_bytes(path, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not UTF-8 text (byte {error.start})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def open_binary(path: str | os.PathLike[str]) -> Iterator[BinaryReader]:
    """Open a regular file for bounded reading. Raise as `open_regular` does."""
    with open_regular(path) as file:
        yield BinaryReader(os.fspath(path), file, os.fstat(file.fileno()).st_size)
