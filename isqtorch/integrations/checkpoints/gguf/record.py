"""What is known about one architecture of GGUF files: its configuration, and where its parameters are.

The names of tensors come from the table of the `gguf` package,
which maps module paths of many model families; a record has the names that the table lacks. Of that package, only tables
are used: its reader is not made for files of strangers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from .facts import Facts
from .layout import Change, Place, Rows
from .parts import HeadDim, Part, Values

RowsOf = Callable[[Any], Rows]
"""Text config of a model -> order of rows."""


@dataclass(frozen=True)
class Names:
    """Where the file has parameters that the table of the `gguf` package does not know.

    Attributes:
        pattern: regular expression for the end of the parameter's name, after the start or a point. It must match to the
            end. The first group, if any, is the number of the block.
        tensors: one or more alternatives, the one to write first. Each has one name, or several that are joined along
            the rows. "{}" is the number of the block.
        part: the last group of the pattern is the number of the entry that the parameter is in the tensor.
        build: makes the parameter of several tensors, which joining them does not; see `Place`.
    """

    pattern: str
    tensors: tuple[tuple[str, ...], ...]
    part: bool = False
    build: Callable[[list[Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Treatment:
    """What the converter does to some parameters.

    Attributes:
        pattern: regular expression for the end of the parameter's name, after the start or a point.
        rows: config -> order of the rows; None: as in the model.
        columns: config -> order of the columns; None: as in the model.
        changes: what is done to the values.
    """

    pattern: str
    rows: RowsOf | None = None
    columns: RowsOf | None = None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files, and the model class of transformers that has its tensors.

    Attributes:
        name: general.architecture in the file.
        model_types: types of configs that are written as it; a file is read as the first one.
        parts: the configuration.
        head: the part that knows the width of a head, if the model has attention heads of one width.
        names: where parameters are that the `gguf` package does not know.
        treatments: what is done to rows and values. All that match apply, in this order.
        when: whether a file with this name is of this record; None: always. The first record that applies is taken.
        tables: name of the table in the `gguf` package, if it is another one.
        harmless: keys that need no place in the config.
        ignored: regular expression for tensors that have no place in the model, and whose absence changes nothing.
        model: class of the model, for `architectures` of the config; None: the causal language model of the type.
        reads_as: type of the config that is read, if it is not the first of `model_types`.
        written: config -> further keys to write, which reading does not need.
        note: for people: what a file of this architecture lacks; empty: nothing.
    """

    name: str
    model_types: tuple[str, ...]
    parts: tuple[Part, ...]
    head: HeadDim | None = None
    names: tuple[Names, ...] = ()
    treatments: tuple[Treatment, ...] = ()
    when: Callable[[Facts], bool] | None = None
    tables: str | None = None
    harmless: frozenset[str] = field(default_factory=frozenset)
    ignored: str = r"rope_(freqs|factors_\w+)\.weight"
    model: str | None = None
    reads_as: str | None = None
    written: Callable[[Any], Values] | None = None
    note: str = ""

    def values(self, facts: Facts) -> Values:
        """Attributes of the config, from the metadata of a file.

        Raises:
            ValueError: a key is missing, or has a wrong type or value.
        """
        values: Values = {}
        for part in self.parts:
            part.read(facts, values)
        return values

    def keys(self, config: Any) -> Values:
        """Metadata of a file for a text config, by key without the architecture.

        Raises:
            ValueError: a file of this architecture cannot say what the config says.
        """
        keys: Values = {}
        for part in self.parts:
            part.write(config, keys)
        return keys | (self.written(config) if self.written else {})

    def places(self, parameter: str, config: Any) -> list[Place]:
        """Where a parameter or saved buffer may be in a file: the place to write first, then others to read.

        Args:
            parameter: its name in the model, such as "model.layers.0.self_attn.q_proj.weight".
            config: the text config of the model.

        Returns:
            Empty if the architecture has no such parameter.
        """
        rows = columns = None
        changes: tuple[Change, ...] = ()
        for treatment, pattern in zip(self.treatments, self._treated, strict=True):
            if pattern.fullmatch(parameter):
                rows = treatment.rows(config) if treatment.rows else rows
                columns = treatment.columns(config) if treatment.columns else columns
                changes += treatment.changes
        is_bias = parameter.rpartition(".")[2].endswith("bias")
        return [
            replace(place, rows=rows, columns=columns, changes=changes, is_bias=is_bias)
            for place in self._tensors(parameter, _block_count(config))
        ]

    def _tensors(self, parameter: str, blocks: int) -> list[Place]:
        for names, pattern in zip(self.names, self._named, strict=True):
            match = pattern.fullmatch(parameter)
            if match is not None:
                groups = match.groups()
                number = groups[0] if groups else ""
                part = int(groups[-1]) if names.part else None
                return [
                    Place(
                        tuple(each.format(number) for each in tensors),
                        part=part,
                        build=names.build if len(tensors) > 1 else None,
                    )
                    for tensors in names.tensors
                ]
        known = _table(self.tables or self.name, blocks)
        path, _, leaf = parameter.rpartition(".")
        stem, suffix = (path, f".{leaf}") if leaf in ("weight", "bias") else (parameter, ".weight")
        for start in _STARTS:
            found = known.get(stem.removeprefix(start))
            if found is not None:
                return [Place((found + suffix,))]
        return []

    @cached_property
    def _treated(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_ending(treatment.pattern) for treatment in self.treatments)

    @cached_property
    def _named(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_ending(names.pattern) for names in self.names)


# Some families are in the table without the name of the trunk, and some with another one.
_STARTS = ("", "model.", "transformer.", "backbone.")


def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.+\.)?(?:{pattern})")


def _block_count(config: Any) -> int:
    count = getattr(config, "num_hidden_layers", 0) or 0
    return max(int(count), int(getattr(config, "num_decoder_layers", 0) or 0))


@cache
def _table(architecture: str, blocks: int) -> Mapping[str, str]:
    """Module path -> name in the file without the suffix, from the table of the `gguf` package."""
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError:
        raise ImportError(
            "GGUF files need the package `gguf` for the names of tensors: pip install gguf, or pip install 'isqtorch[hf]'"
        ) from None
    number = next((number for number, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        raise ImportError(
            f"this version of the package `gguf` does not know {architecture!r}: pip install --upgrade gguf"
        )
    table = get_tensor_name_map(number, blocks)
    return {path: name for path, (_, name) in table.mapping.items()}
