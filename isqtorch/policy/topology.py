"""Topology: formats for some of the layers, from a dict or a YAML file.

    0-8: q5k                        # layers 0..7: the end is exclusive
    12: {isq: q8_0, device: "cuda:1"}
    '/\\.mlp\\.down_proj$/': 6        # a regex, searched in the full module path
    '/lm_head/': null               # leave it as it is

If several entries match a layer, a regex wins over a range, and of two regexes or two ranges the later wins. Only the
winning entry applies; entries are not merged. Two entries for the same layers, such as 3 and '03', are an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from isqtorch.files.writing import write_atomically
from isqtorch.formats import QuantFormat, Spec, resolve_format

from .patterns import PathRegex, Patience
from .yaml_subset import read_yaml

MAX_ENTRIES = 4096  # each is tried on every layer; a file with a format for every expert of a large model has fewer

_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?:\.|$)")
_LONGEST_KEY = 1000  # characters; YAML takes up to 1024 without "? " before the key
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_EXAMPLES = "a layer number (12), a range with an exclusive end (0-8) or a regex between slashes (/lm_head/)"


@dataclass(frozen=True)
class Entry:
    """One line of a topology: the layers it applies to, and their format and device."""

    key: str
    start: int = 0  # layers start <= i < stop; a regex leaves both 0
    stop: int = 0
    regex: PathRegex | None = None
    spec: Spec | None = None  # None: no format of its own
    leave: bool = False  # leave the layer as it is
    device: torch.device | None = None

    def matches(self, name: str, index: int | None) -> bool:
        """Whether the entry applies to the module path `name`, which has this layer number."""
        if self.regex is not None:
            return self.regex.search(name)
        return index is not None and self.start <= index < self.stop


class Topology:
    """Formats (and devices) for some of the layers of a model, by layer number or by regex.

    A key is a layer number (12), a range with an exclusive end (0-8), or a regex between slashes (/lm_head/) that is
    searched in the full module path. A value is a format name, a number of bits, None (leave the layer as it is), or a
    mapping with `isq` and `device`. If several entries match, a regex wins over a range, and otherwise the later entry
    wins.

    Attributes:
        entries: the parsed entries, in order.

    Example:
        topology = isqtorch.Topology.load({"0-2": 8, "/lm_head/": None})
        report = isqtorch.quantize_(model, 4, topology=topology)
    """

    def __init__(self, entries: tuple[Entry, ...], patience: Patience | None = None) -> None:
        self.entries = entries
        self.patience = patience or Patience()  # shared by all regexes
        latest_first = entries[::-1]
        self._by_rank = sorted(latest_first, key=lambda entry: entry.regex is None)  # the first that matches wins

    @classmethod
    def load(cls, source: TopologyLike) -> Topology:
        """Make a topology from a dict or from the path of a YAML file.

        Args:
            source: a dict, a path, or a Topology, which is returned as it is.

        Raises:
            ValueError: an entry does not parse (the message names it), two entries are for the same layers, there are
                more than 4096 entries, or the file is larger than 1 MiB or not YAML of this kind.
            OSError: the file cannot be read.
        """
        if isinstance(source, Topology):
            return source
        if isinstance(source, (str, os.PathLike)):
            source = read_yaml(Path(source), MAX_ENTRIES)
        if not isinstance(source, Mapping):
            raise ValueError(f"topology: must be a dict or the path of a YAML file, got {type(source).__name__}")
        if len(source) > MAX_ENTRIES:
            raise ValueError(
                f"topology: there are {len(source)} entries, the limit is {MAX_ENTRIES}. Join entries: one regex matches many layers."
            )
        patience = Patience()
        entries = tuple(_entry(key, value, patience) for key, value in source.items())
        seen: dict[object, str] = {}
        for entry in entries:
            place = entry.regex or (entry.start, entry.stop)
            if place in seen:
                raise ValueError(
                    f"topology: entries {seen[place]!r} and {entry.key!r} are for the same layers; leave one of both out"
                )
            seen[place] = entry.key
        return cls(entries, patience)

    @classmethod
    def exact(cls, formats: Mapping[str, str | None]) -> Topology:
        """Make a topology from {module path: format}; None leaves a layer as it is. No other layer matches.

        Layers with the same format whose paths differ only in a number share one entry.

        Args:
            formats: the format of each layer, by full module path.
        """
        return cls.load({f"/^{pattern}$/": fmt for pattern, fmt in _merged(formats)})

    def to_dict(self) -> dict[str, Any]:
        """The topology as a dict of plain types that `load` accepts."""
        out: dict[str, Any] = {}
        for entry in self.entries:
            spec = entry.spec.name if isinstance(entry.spec, QuantFormat) else entry.spec
            if entry.device is None:
                out[entry.key] = spec
            else:
                asked = {"isq": spec} if entry.leave or spec is not None else {}
                out[entry.key] = {**asked, "device": str(entry.device)}
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML file that `load` can read. An existing file is replaced atomically.

        Args:
            path: the file to write.

        Raises:
            OSError: the file cannot be written.
        """
        lines = []
        for key, value in self.to_dict().items():
            text = _yaml(key)
            lines.append(f"? {text}\n: {_yaml(value)}\n" if len(text) > _LONGEST_KEY else f"{text}: {_yaml(value)}\n")
        write_atomically(path, ["".join(lines).encode()])

    def find(self, name: str) -> Entry | None:
        """The entry that applies to the module path `name`, or None."""
        index = _layer_index(name)
        return next((entry for entry in self._by_rank if entry.matches(name, index)), None)

    def unmatched(self, names: Iterable[str]) -> list[Entry]:
        """The entries that match none of these module paths."""
        left = list(self.entries)
        for name in names:
            index = _layer_index(name)
            left = [entry for entry in left if not entry.matches(name, index)]
        return left


TopologyLike = Topology | Mapping[Any, Any] | str | os.PathLike[str]


def _merged(formats: Mapping[str, str | None]) -> list[tuple[str, str | None]]:
    """(regex of paths, format) in the order of first appearance, with paths joined that differ in one number.

    The last number of a path (of the expert) is joined first, then the first (of the block).
    """
    entries = [(tuple(map(re.escape, path.split("."))), fmt) for path, fmt in formats.items()]
    for last in (True, False):
        joined: dict[tuple[Any, ...], list[str]] = {}  # (parts before the number, parts after it, format) -> numbers
        for parts, fmt in entries:
            at = [i for i, part in enumerate(parts) if part.isdecimal()]
            i = (at[-1] if last else at[0]) if at else len(parts)
            joined.setdefault((parts[:i], parts[i + 1 :], fmt), []).extend(parts[i : i + 1])
        entries = [
            ((*before, *_alternatives(numbers), *after), fmt) for (before, after, fmt), numbers in joined.items()
        ]
    return [(r"\.".join(parts), fmt) for parts, fmt in entries]


def _alternatives(numbers: list[str]) -> list[str]:
    return numbers if len(numbers) < 2 else [f"(?:{'|'.join(numbers)})"]


def _yaml(value: Any) -> str:
    """A key or value of a topology as YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)  # control characters need the escapes of a double-quoted string
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "null" if value is None else str(value)


def _layer_index(name: str) -> int | None:
    """The number of the layer that a module path belongs to, or None."""
    index = _LAYER_INDEX.search(name)
    return None if index is None else int(index[1])


def _entry(key: object, value: object, patience: Patience) -> Entry:
    start, stop, regex = _place(key, patience)
    spec, leave, device = _wish(str(key), value)
    return Entry(str(key), start, stop, regex, spec, leave, device)


def _place(key: object, patience: Patience) -> tuple[int, int, PathRegex | None]:
    """(start, stop, regex) of a key."""
    if isinstance(key, bool) or not isinstance(key, (int, str)):
        raise ValueError(f"topology: key {key!r:.200} is not {_EXAMPLES}")
    text = key if isinstance(key, str) else f"{key:#x}" if abs(key) > 10**9 else str(key)  # no end of digits
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        return 0, 0, PathRegex(text[1:-1], f"topology: entry {text!r:.200}", patience)
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"topology: unknown key {text!r:.200}. A key is {_EXAMPLES}.")
    start = int(match[1])
    stop = start + 1 if match[2] is None else int(match[2])
    if stop <= start:
        raise ValueError(f"topology: entry {text!r}: the end of a range is exclusive and must be larger than its start")
    return start, stop, None


def _wish(key: str, value: object) -> tuple[Spec | None, bool, torch.device | None]:
    """(format, leave, device) of a value."""
    if not isinstance(value, Mapping):
        return _spec(key, value), value is None, None
    unknown = sorted(f"{name!s:.80}" for name in value if name not in ("isq", "device"))
    if unknown or not value:
        what = f"unknown subkey {unknown[0]!r}" if unknown else "an empty mapping says nothing"
        raise ValueError(
            f"topology: entry {key!r:.200}: {what}. Use isq (a format, or null to leave the layer) and device."
        )
    device = _device(key, value["device"]) if "device" in value else None
    leave = "isq" in value and value["isq"] is None
    return _spec(key, value.get("isq")), leave, device


def _spec(key: str, value: object) -> Spec | None:
    if value is None:
        return None
    try:
        resolve_format(cast(Spec, value))  # it checks the type itself
    except ValueError as error:
        raise ValueError(f"topology: entry {key!r:.200}: {error}") from None
    return cast(Spec, value)


def _device(key: str, value: object) -> torch.device:
    try:
        return torch.device(cast(str, value))
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise ValueError(
            f"topology: entry {key!r:.200}: device {value!r:.80} is not a torch device such as cpu or cuda:1"
        ) from None
