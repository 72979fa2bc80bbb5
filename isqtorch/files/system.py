"""What differs between operating systems: locks on folders, flushing, ports, and how much memory there is.

No other file uses what only some systems have. On Windows a folder cannot be opened or locked, so a file in it is locked; and
a folder with an open file cannot be removed, so the lock is given back first.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from typing import Any

_LOCK = "lock"


def try_lock(folder: str, *, wait: bool) -> int | None:
    """Lock a folder until `release` is called.

    Returns:
        A descriptor. None: the folder is gone. Without `wait`, also None if another process holds the lock, or if the file
        system has no locks: then nothing says that its process is dead.
    """
    try:
        descriptor = _open(folder)
    except OSError:
        return None
    try:
        _lock(descriptor, wait)
    except OSError:
        if not wait:
            os.close(descriptor)
            return None
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(_locked(folder))):
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def release(folder: str, descriptor: int) -> None:
    """Remove a locked folder with all that it holds, and give the lock back."""
    if _is_windows():
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)
    else:  # while the lock is held, no other process takes the folder for one that was left
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def flush(path: str | os.PathLike[str]) -> None:
    """Write a file to the disk. OSError if that fails."""
    with open(path, "r+b" if _is_windows() else "rb") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def claim_port(listener: socket.socket) -> None:
    """Before `bind`: a server may have the port of one that has just ended, and never that of one that runs."""
    if _is_windows():  # where SO_REUSEADDR gives the same port to several servers
        listener.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE"), 1)  # noqa: B009  # only there
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def memory() -> tuple[int, int | None]:
    """Bytes of RAM, and how many of them are free; None where the system does not say."""
    if _is_windows():
        return _windows_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None


def peak_resident_bytes() -> int | None:
    """Peak resident memory of this process in bytes; None where Python does not say."""
    if _is_windows():
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def c_function(name: str) -> Any:
    """A function of the C library that only some systems have, or None."""
    if _is_windows():
        return None
    import ctypes

    return getattr(ctypes.CDLL(None), name, None)


def _is_windows() -> bool:
    return str(sys.platform) == "win32"  # as a call: for type checkers, the rest of a function would be unreachable


def _locked(folder: str) -> str:
    return os.path.join(folder, _LOCK) if _is_windows() else folder


def _open(folder: str) -> int:
    if _is_windows():
        return os.open(_locked(folder), os.O_RDWR | os.O_CREAT)
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _lock(descriptor: int, wait: bool) -> None:
    if _is_windows():
        msvcrt: Any = __import__("msvcrt")
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _windows_memory() -> tuple[int, int | None]:
    import ctypes

    class Status(ctypes.Structure):
        """MEMORYSTATUSEX."""

        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *(
                (name, ctypes.c_uint64)
                for name in ("total", "free", "page", "free_page", "virtual", "free_virtual", "more")
            ),
        ]

    status = Status(length=ctypes.sizeof(Status))
    windll: Any = getattr(ctypes, "windll")  # noqa: B009  # only there
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("Windows does not say how much memory there is")
    return status.total, status.free
