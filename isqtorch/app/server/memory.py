"""Giving freed memory back to the system."""

from __future__ import annotations

from isqtorch.files.system import c_function


def release_memory() -> None:
    """Give freed memory back, after something large; takes some milliseconds.

    glibc keeps what was freed between pieces that are still in use, so a server would grow with the largest requests
    that it ever had at once. Other libraries for memory have no such function and need none.
    """
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)
