"""Changes to valid inputs that keep most of their structure, so that they reach the code behind the first check."""

from __future__ import annotations

import copy
import os
import random
import tempfile
from pathlib import Path
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
FLOATS = (0.0, -0.0, 0.5, 1e-45, 3e38, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "\0", "a" * 300, "q4k", "Q4_K", "auto", "q4k_m", "None", "0", "-1", "1e9", "../x", "/", "//", "/(/", "\u202e",
         "\ud800", "\U0001f600", "é", "true", "null", "~", "*", "a.b.c", "cpu", "cuda:99", "meta")  # fmt: skip
LEAVES = (None, True, False, *NUMBERS, *FLOATS, *TEXTS, [], {}, [[]], [None], {"": None})


def text(rng: random.Random, source: str, words: tuple[str, ...]) -> str:
    """A few random changes to a text: words put in, pieces removed, repeated and moved."""
    out = source
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 1, 3, 10)))
        kind = rng.randrange(6)
        if kind < 3:
            out = out[:at] + rng.choice(words) + out[at if kind else end :]
        elif kind == 3:
            out = out[:at] + out[end:]
        elif kind == 4:
            out = out[:end] + out[at:end] * rng.choice((1, 2, 50)) + out[end:]
        else:
            out = (
                out[:at]
                + chr(rng.choice((0, 9, 10, 13, 32, 58, 91, 123, 0xA0, 0x2028, rng.randrange(0xD800))))
                + out[at:]
            )
    return out


def tree(rng: random.Random, source: Any, leaves: tuple[Any, ...] = LEAVES) -> Any:
    """A few random changes to nested dicts and lists, as JSON has them."""
    out = copy.deepcopy(source)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        out = _tree_once(rng, out, leaves)
    return out


def _tree_once(rng: random.Random, value: Any, leaves: tuple[Any, ...]) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.randrange(10)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[rng.choice((*TEXTS, key + "x"))] = value[key]
        elif kind == 2:
            value[rng.choice(list(value))] = copy.deepcopy(value[key])
        else:
            value[key] = _tree_once(rng, value[key], leaves)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        kind = rng.randrange(5)
        if kind == 0:
            del value[at]
        elif kind == 1:
            value.insert(at, rng.choice(leaves))
        elif kind == 2:
            value += value
        else:
            value[at] = _tree_once(rng, value[at], leaves)
        return value
    kind = rng.randrange(8)
    if kind == 0:
        return [value]
    if kind == 1:
        return {rng.choice(TEXTS): value}
    if kind == 2 and isinstance(value, str):
        return text(rng, value, TEXTS)
    if kind == 3 and isinstance(value, int):
        return value + rng.choice((-1, 1, 2**31))
    return copy.deepcopy(rng.choice(leaves))


FOLDER = "FUZZ_FOLDER"
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def folder() -> Path:
    """A folder of this process, in memory where that is possible, for inputs that must be files."""
    if FOLDER in os.environ:  # the driver's, who removes it even if this process crashes
        return Path(os.environ[FOLDER])
    if not _FOLDERS:
        _FOLDERS.append(new_folder())
    return Path(_FOLDERS[0].name)


def new_folder() -> tempfile.TemporaryDirectory[str]:
    in_memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz", dir=in_memory if in_memory.is_dir() else None)


def written(data: bytes | str, name: str = "file") -> Path:
    """The path of a file with these contents."""
    path = folder() / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path
