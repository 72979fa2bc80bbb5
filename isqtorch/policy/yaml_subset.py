"""Reading the YAML of a topology file: a mapping of plain values and of small mappings, and nothing else.

The file is read as a stream of events, so that a hostile one costs no more than its size: reading ends at the first
list, anchor, tag or key too many, and no object is made of what a tag asks for. Keys stay the text of the file: YAML
itself would read the key 010 as 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from isqtorch.files.binary import open_regular

MAX_FILE_BYTES = 1 << 20


def read_yaml(path: Path, most: int) -> Any:
    """Read a topology file with at most `most` entries.

    Returns:
        A dict. If the file holds no mapping: an empty list for a list, else a plain value, for the caller's message.

    Raises:
        ValueError: PyYAML is missing, the file is too large, is not YAML, has a key twice, or holds more than plain
            values and mappings of them.
        OSError: the file cannot be read.
    """
    try:
        import yaml
    except ImportError:
        raise ValueError(
            f"topology: reading {path} needs PyYAML (pip install pyyaml); a dict works without it"
        ) from None
    with open_regular(path) as file:
        text = file.read(MAX_FILE_BYTES + 1)
    if len(text) > MAX_FILE_BYTES:
        raise ValueError(f"topology: {path} is larger than {MAX_FILE_BYTES} bytes; that is not a topology")
    try:
        return _Reader(path, most, yaml).document(text)
    except yaml.YAMLError as error:
        raise ValueError(f"topology: {path} is not valid YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"topology: {path} is nested too deeply") from None


class _Reader:
    """Builds the mapping from the events of one file."""

    def __init__(self, path: Path, most: int, yaml: Any) -> None:
        self._path, self._most, self._yaml = path, most, yaml

    def document(self, text: bytes) -> Any:
        yaml = self._yaml
        # The parser in C is twenty times as fast. Some builds of PyYAML lack it.
        self._loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        try:
            events = self._events()
            for event in events:
                if not isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent)):
                    break
            if isinstance(event, yaml.StreamEndEvent):
                return None
            if isinstance(event, yaml.SequenceStartEvent):
                return []
            if isinstance(event, yaml.ScalarEvent):
                return self._value(event)
            if not isinstance(event, yaml.MappingStartEvent):
                self._refuse(event, "an alias has no place in a topology")
            content = self._mapping(events, event, nested=False)
            next(events)  # the end of the document
            last = next(events)
            if not isinstance(last, yaml.StreamEndEvent):
                self._refuse(last, "there is a second document")
            return content
        finally:
            self._loader.dispose()

    def _events(self) -> Iterator[Any]:
        while self._loader.check_event():
            yield self._loader.get_event()

    def _mapping(self, events: Iterator[Any], start: Any, *, nested: bool) -> dict[str, Any]:
        yaml = self._yaml
        out: dict[str, Any] = {}
        self._check_plain(start)
        for key in events:
            if isinstance(key, yaml.MappingEndEvent):
                break
            if not isinstance(key, yaml.ScalarEvent):
                self._refuse(key, "a key must be a layer number, a range or a regex")
            self._check_plain(key)
            if key.value in out:
                self._refuse(key, f"key {key.value!r:.200} is there twice")
            if len(out) == self._most:
                self._refuse(
                    key, f"there are more than {self._most} entries. Join entries: one regex matches many layers."
                )
            value = next(events)
            if isinstance(value, yaml.ScalarEvent):
                out[key.value] = self._value(value)
            elif isinstance(value, yaml.MappingStartEvent) and not nested:
                out[key.value] = self._mapping(events, value, nested=True)
            else:
                self._refuse(
                    value,
                    f"the value of {key.value!r:.200} must be a format, a number of bits, null, or {{isq: ..., device: ...}}",
                )
        return out

    def _value(self, event: Any) -> str | int | float | bool | None:
        """A scalar as text, number, truth value or None. Times and other types stay text."""
        self._check_plain(event)
        text: str = event.value
        kind = self._loader.resolve(self._yaml.ScalarNode, text, event.implicit).rpartition(":")[2]
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        try:
            return int(text) if kind == "int" else float(text) if kind == "float" else text
        except ValueError:  # 0x10, 1:30, .inf: no number of bits is written so
            return text

    def _check_plain(self, event: Any) -> None:
        if event.anchor is not None or event.tag is not None:
            what = f"tag {event.tag}" if event.tag is not None else f"anchor &{event.anchor}"
            self._refuse(event, f"the {what:.80} has no place in a topology")

    def _refuse(self, event: Any, why: str) -> NoReturn:
        line = event.start_mark.line + 1
        raise ValueError(f"topology: {self._path} is not valid YAML for a topology: line {line}: {why}")
