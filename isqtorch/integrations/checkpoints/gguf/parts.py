"""Parts of a configuration, each in both directions: keys of a GGUF file, and attributes of a transformers config.

An architecture lists its parts. Reading goes through them in order, and a part may look at values that earlier ones
have set. Writing collects the keys of all parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .facts import MOST, REQUIRED, Facts

Values = dict[str, Any]
"""Attributes of a config by name, or values of metadata by key without the architecture."""

Kind = Literal["integer", "number", "flag", "text"]


class Part(ABC):
    """A part of a configuration."""

    @abstractmethod
    def read(self, facts: Facts, values: Values) -> None:
        """Add attributes of the config to `values`. Raise ValueError if the file contradicts itself or lacks a key."""

    @abstractmethod
    def write(self, config: Any, keys: Values) -> None:
        """Add metadata to `keys`. Raise ValueError if the file format cannot say what the config says.

        The type of a value is the type in the file: int (u32), float (f32), bool, str, list.
        """


@dataclass(frozen=True)
class Key(Part):
    """One attribute that is one key.

    Attributes:
        attribute: its name in the config.
        key: its name in the file.
        kind: the type of the value.
        default: what to set if the file does not have it; REQUIRED: an error; None: nothing, the config's own default.
        least: the smallest integer allowed.
        most: the largest integer allowed; None: the largest dimension of a tensor, because it is a size.
        codes: {value in the file: value in the config}, where they differ.
    """

    attribute: str
    key: str
    kind: Kind = "integer"
    default: Any = REQUIRED
    least: int = 1
    most: int | None = None
    codes: Mapping[Any, Any] | None = None

    def read(self, facts: Facts, values: Values) -> None:
        if self.kind == "integer":
            value = facts.integer(self.key, self.default, self.least, self.most)
        else:
            value = getattr(facts, self.kind)(self.key, self.default)
        if value is None:
            return
        if self.codes is not None and facts.has(self.key):
            if value not in self.codes:
                raise facts.wrong(self.key, value, f"one of {', '.join(map(str, self.codes))}")
            value = self.codes[value]
        values[self.attribute] = value

    def write(self, config: Any, keys: Values) -> None:
        value = getattr(config, self.attribute, None)
        if value is None:
            value = None if self.default is REQUIRED else self.default
        if value is None and self.default is REQUIRED:
            raise ValueError(f"the config has no {self.attribute!r}")
        if value is None:
            return
        if self.codes is not None:
            back = {there: here for here, there in self.codes.items()}
            if value not in back:
                raise ValueError(f"{self.attribute} is {value!r}, and a file can only say {', '.join(map(str, back))}")
            value = back[value]
        keys[self.key] = float(value) if self.kind == "number" else value


@dataclass(frozen=True)
class Always(Part):
    """An attribute that has one value in all files of an architecture. A config with another one cannot be written."""

    attribute: str
    value: Any

    def read(self, facts: Facts, values: Values) -> None:
        values[self.attribute] = self.value

    def write(self, config: Any, keys: Values) -> None:
        value = getattr(config, self.attribute, self.value)
        if value != self.value:
            raise ValueError(
                f"{self.attribute} is {value!r}, and a GGUF file of this architecture always means {self.value!r}"
            )


@dataclass(frozen=True)
class Present(Part):
    """A flag that a file does not state: a tensor is there, or it is not. "*" is any block that has it."""

    attribute: str
    tensor: str
    if_there: Any = True
    if_not: Any = False

    def read(self, facts: Facts, values: Values) -> None:
        start, any_block, end = self.tensor.partition("*")
        there = self.tensor in facts.shapes
        if any_block:
            there = any(name.startswith(start) and name.endswith(end) for name in facts.shapes)
        values[self.attribute] = self.if_there if there else self.if_not

    def write(self, config: Any, keys: Values) -> None:
        pass  # the tensors say it


@dataclass(frozen=True)
class Derived(Part):
    """An attribute that a file does not state, computed from the others.

    Attributes:
        attribute: its name in the config.
        of: file, attributes so far -> the value; None: the config's own default.
        checked: a config whose value is another one cannot be written.
    """

    attribute: str
    of: Callable[[Facts, Values], Any]
    checked: Callable[[Any], Any] | None = None

    def read(self, facts: Facts, values: Values) -> None:
        value = self.of(facts, values)
        if value is not None:
            values[self.attribute] = value

    def write(self, config: Any, keys: Values) -> None:
        if self.checked is not None and getattr(config, self.attribute, None) != self.checked(config):
            raise ValueError(
                f"{self.attribute} is {getattr(config, self.attribute, None)!r}, and a GGUF file of this architecture always "
                f"means {self.checked(config)!r}"
            )


@dataclass(frozen=True)
class Only(Part):
    """A key that is read for its value alone: any other value than these would change the numbers, and is refused.

    Attributes:
        key: its name in the file.
        allowed: the values that the model class computes.
        written: what to write; None: nothing.
    """

    key: str
    allowed: tuple[Any, ...]
    written: Any = None

    def read(self, facts: Facts, values: Values) -> None:
        value = facts.value(self.key, None)
        if value is not None and value not in self.allowed:
            raise facts.error(
                f"{facts.architecture}.{self.key} is {value!r:.80}, and the model class in transformers computes only "
                f"{' or '.join(map(str, self.allowed))}"
            )

    def write(self, config: Any, keys: Values) -> None:
        if self.written is not None:
            keys[self.key] = self.written


@dataclass(frozen=True)
class HeadDim(Part):
    """The width of one attention head: `head_dim`, and attention.key_length and value_length in the file.

    Attributes:
        heads: the attribute with the number of heads, which an earlier part has set.
        hidden: the attribute with the width of the model.
        stored: the config has `head_dim`; else the width must follow from the two others.
    """

    heads: str = "num_attention_heads"
    hidden: str = "hidden_size"
    stored: bool = True

    def read(self, facts: Facts, values: Values) -> None:
        default = values[self.hidden] // values[self.heads]
        size = facts.integer("attention.key_length", default, least=1)
        if facts.integer("attention.value_length", size, least=1) != size:
            raise facts.wrong(
                "attention.value_length", facts.value("attention.value_length"), f"{size}, the width of keys"
            )
        if self.stored:
            values["head_dim"] = size
        elif size != default:
            raise facts.wrong("attention.key_length", size, f"{default}, the width divided by the number of heads")

    def write(self, config: Any, keys: Values) -> None:
        keys["attention.key_length"] = keys["attention.value_length"] = self.of(config)

    def of(self, config: Any) -> int:
        """The width according to a config."""
        size = getattr(config, "head_dim", None) if self.stored else None
        return int(size or getattr(config, self.hidden) // getattr(config, self.heads))


@dataclass(frozen=True)
class Layers(Part):
    """`layer_types` of a model with sliding windows.

    Attributes:
        every: every so many layers, the last one of them attends to everything.
        key: the key that may say it, as a number or as one flag for each layer; None: no key.
        first_full: the first of each run is the full one.
    """

    every: int
    key: str | None = "attention.sliding_window_pattern"
    first_full: bool = False

    def read(self, facts: Facts, values: Values) -> None:
        values["sliding_window"] = facts.integer(
            "attention.sliding_window", values.get("sliding_window", REQUIRED), most=MOST
        )
        count = values["num_hidden_layers"]
        pattern = facts.value(self.key, self.every) if self.key else self.every
        if self.key is not None and isinstance(pattern, (list, np.ndarray)):
            full = [not window for window in facts.flags(self.key, count)]
        elif isinstance(pattern, int) and not isinstance(pattern, bool) and 0 < pattern < 1 << 16:
            full = [self._is_full(layer, pattern) for layer in range(count)]
        else:
            raise facts.wrong(str(self.key), pattern, "a number, or a flag for each layer")
        values["layer_types"] = ["full_attention" if each else "sliding_attention" for each in full]

    def _is_full(self, layer: int, every: int) -> bool:
        return layer % every == (0 if self.first_full else every - 1)

    def write(self, config: Any, keys: Values) -> None:
        keys["attention.sliding_window"] = config.sliding_window
        types = list(config.layer_types)
        usual = ["full_attention" if self._is_full(i, self.every) else "sliding_attention" for i in range(len(types))]
        if types != usual:
            if self.key is None:
                raise ValueError(
                    "layer_types is not the usual pattern, and a GGUF file of this architecture cannot say so"
                )
            keys[self.key] = [kind == "sliding_attention" for kind in types]
