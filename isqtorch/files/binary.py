"""Reading binary files that strangers wrote: every length is checked against what the file still holds before it is used.

And writing them: a file appears under its name when it is complete, or not at all.

Plain reads instead of mmap: a mapped file that somebody truncates kills the process with SIGBUS, a read just ends early.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_NAME_BYTES = 1024

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
    """A little-endian file and a position in it. Every method that reads takes `what`, which its error message names.

    No method allocates more than the bytes it returns, and none returns more than the file holds.
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
        """The exception to raise: names the file, the byte (`at`, or here), and what is wrong there."""
        return ValueError(f"{self.path}: byte {self.position if at is None else at}: {message}")

    def require(self, nbytes: int, what: str) -> None:
        """ValueError unless `nbytes` more bytes are there."""
        if nbytes > self.remaining:
            raise self.error(f"{what} needs {nbytes} bytes, {self.remaining} are left in the file")

    @staticmethod
    def width(kind: str) -> int:
        """Bytes of one number of `kind`."""
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
        """One integer; `kind` is "u8", "i32", "u64", ..."""
        return int(self.scalar(kind, what))

    def scalar(self, kind: str, what: str) -> int | float:
        """One number; `kind` is "u8", "i32", "u64", "f32", ..."""
        unpacker = _SCALARS[kind]
        value: int | float = unpacker.unpack(self.take(unpacker.size, what))[0]
        return value

    def count(self, kind: str, what: str, item_bytes: int, most: int | None = None, least: int = 0) -> int:
        """A number of items that follow, `least` to `most`, each of at least `item_bytes` bytes in the file."""
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
        """A length of `kind` and that many bytes of UTF-8: 1 to 1024 bytes, nothing unprintable."""
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
        """A length of `kind` and that much text for people; bytes that are not UTF-8 are replaced."""
        length = self.count(kind, f"length of {what}", item_bytes=1)
        return self.take(length, what).decode("utf-8", errors="replace")

    def floats(self, count: int, what: str) -> NDArray[np.float32]:
        """`count` f32 values, read straight into the array that is returned."""
        self.require(4 * count, what)
        values = np.empty(count, dtype="<f4")
        if self._file.readinto(values.data) != values.nbytes:
            raise self.error(f"{what}: the file became shorter while it was read")
        self.position += values.nbytes
        return values


@contextmanager
def open_binary(path: str | os.PathLike[str]) -> Iterator[BinaryReader]:
    """Open a regular file for bounded reading.

    Raises:
        FileNotFoundError, PermissionError, ...: as `open` does.
        ValueError: a directory, pipe or device: only a regular file has the size that bounds the reads.
    """
    name = os.fspath(path)
    if not stat.S_ISREG(os.stat(name).st_mode):  # before open(), which waits for ever on a pipe
        raise ValueError(f"{name}: not a regular file")
    with open(name, "rb") as file:
        yield BinaryReader(name, file, os.fstat(file.fileno()).st_size)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, which is moved over it at the end; a failure leaves what was there before.

    There is an empty file under the temporary path. Whoever writes a new one there changes nothing about the permissions, which
    are those that the user's umask gives.

    Raises:
        OSError: as `open` and writing do.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    """Write a file in the way of `replacing`; errors as there."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(pieces)
