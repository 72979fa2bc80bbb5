"""The metadata of one file, read with types. Every error names the file and the key."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_REQUIRED: Any = object()
REQUIRED = _REQUIRED
"""The default of a key that a file must have."""
MOST = (1 << 31) - 1
"""The largest number that is no size: of positions, tokens, ..."""
_MOST_BLOCKS = 512  # llama.cpp reads no more either; a file of many tiny tensors would otherwise fill the memory
_BLOCK = re.compile(r"(?:enc\.|dec\.)?blk\.(\d{1,6})\.")


class Facts:
    """What a file says about its model.

    Keys are given without the name of the architecture: "block_count" is "llama.block_count" in a Llama file.

    Attributes:
        where: the file, for messages.
        architecture: the name of the architecture in the file.
        metadata: all keys and values.
        shapes: {name of a tensor: its shape, rows before columns}.
        used: keys that were read.
        largest: the largest dimension of a tensor. No size that a key states can be larger.
        blocks: how many blocks the tensors belong to. They are counted: the name of one tensor can have any number.
    """

    def __init__(
        self, where: str, architecture: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.where, self.architecture, self.metadata, self.shapes = where, architecture, metadata, shapes
        self.used: set[str] = set()
        self.largest = max((size for shape in shapes.values() for size in shape), default=0)
        numbers = (_BLOCK.match(name) for name in shapes)
        self.blocks = min(_MOST_BLOCKS, len({int(number[1]) for number in numbers if number}))

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def error(self, message: str) -> ValueError:
        return ValueError(f"load: {self.where}: {message}")

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, of any type."""
        full = f"{self.architecture}.{key}"
        self.used.add(key)
        if full in self.metadata:
            return self.metadata[full]
        if default is _REQUIRED:
            raise self.error(f"has no {full!r}, which a {self.architecture} file needs. The file is incomplete.")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 0, most: int | None = None) -> Any:
        """An integer, or the default. A list of equal integers, one for each layer, is one integer.

        Args:
            key: its name.
            default: the value if the file does not have it.
            least: the smallest value allowed.
            most: the largest value allowed; None: `largest`, for sizes. A model of absurd size is thus never built.
        """
        value = self.value(key, default)
        if value is default and not self.has(key):
            return value
        if isinstance(value, (list, np.ndarray)):
            distinct = {int(each) for each in value} if self._whole(value) else set()
            if len(distinct) != 1:
                raise self.wrong(key, value, "one integer, or the same one for every layer")
            value = distinct.pop()
        most = self.largest if most is None else most
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, value, f"an integer from {least} to {most}")
        return value

    def integers(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of integers; one integer is a list of one."""
        value = self.value(key, default)
        if value is default and not self.has(key):
            return value
        many = value if isinstance(value, (list, np.ndarray)) else [value]
        if not self._whole(many):
            raise self.wrong(key, value, "a list of integers")
        return [int(each) for each in many]

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number as a float, rounded as people write it: the file has 32 bits of it."""
        value = self.value(key, default)
        if value is default and not self.has(key):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(key, value, "a finite number")
        return as_written(float(value))

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or False."""
        value = self.value(key, default)
        if value is default and not self.has(key):
            return value
        if not isinstance(value, bool) and value not in (0, 1):
            raise self.wrong(key, value, "true or false")
        return bool(value)

    def flags(self, key: str, count: int) -> list[bool]:
        """One flag for each of `count` layers."""
        value = self.value(key)
        many = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(many, list) or len(many) != count or any(each not in (0, 1) for each in many):
            raise self.wrong(key, value, f"{count} flags, one for each layer")
        return [bool(each) for each in many]

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.value(key, default)
        if value is default and not self.has(key):
            return value
        if not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor that the file must have."""
        if tensor not in self.shapes:
            raise self.error(
                f"has no tensor {tensor!r}, which a {self.architecture} file needs. The file is incomplete."
            )
        return self.shapes[tensor]

    def wrong(self, key: str, value: Any, needed: str) -> ValueError:
        return self.error(f"{self.architecture}.{key} is {value!r:.80}, must be {needed}. The file is damaged.")

    @staticmethod
    def _whole(values: Any) -> bool:
        return len(values) > 0 and all(
            isinstance(each, (int, np.integer)) and not isinstance(each, bool) and abs(int(each)) <= MOST
            for each in values
        )


def as_written(value: float) -> float:
    """The shortest decimal number that rounds to the same f32: 1e-05 for 9.999999747378752e-06."""
    single = np.float32(value)
    return float(str(single)) if np.isfinite(single) and float(single) == value else value
