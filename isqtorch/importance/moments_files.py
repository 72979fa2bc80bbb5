"""Files of second moments: safetensors with the tensors of every input, and a description in the metadata.

    <n>.<e>.total        f32 [K, K]   sum of x x' of expert e (0 for a layer) in input n; or
    <n>.<e>.rows         f32 [R, K]   the rows themselves, where there are fewer than columns
    <n>.<e>.squares      f32 [K]      its diagonal, so that importance is known without reading the sum
    <n>.<e>.first.*                   the same three for the first tokens of windows
    <n>.<e>.held         [R, K]       held-out rows, f32, f16 or bf16
    <n>.<e>.held_weights f32 [R]      how many tokens each stands for
    <n>.<e>.held_first   bool [R]     whether it is the first token of a window
    other.<n>            f32 [K] or [E, K]   sums of squares of a layer without moments

Everything in a file may be wrong. Names, types and shapes are checked before a tensor is used; values when they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from isqtorch.files.binary import MAX_NAME_BYTES, open_regular
from isqtorch.files.tensors import TensorStore
from isqtorch.files.writing import replacing

from .inputs import Input
from .second import HELD_ROWS, HeldOut, Second

SUFFIX = ".safetensors"
_KEY = "isqtorch_moments"
_VERSION = 1
_MOST_INPUTS = 1 << 15
_MOST_EXPERTS = 1 << 14
_MOST_COUNT = 1 << 50
_MOST_TEXT = 1 << 26  # of the description


@dataclass(frozen=True)
class Content:
    """The content of a file; see `Moments`."""

    inputs: Mapping[str, Sequence[Input]]
    readers: Mapping[str, str]
    stacks: Mapping[str, bool]
    others: Mapping[str, tuple[Tensor, Tensor]]
    facts: Mapping[str, Any]


def is_name(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name holds moments."""
    return os.fspath(path).lower().endswith(SUFFIX)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is in the format safetensors: 8 bytes with the length of a header, and the header, which is JSON.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file.
    """
    with open_regular(path) as file:
        head = file.read(10)
    # In a .cimatrix these bytes belong to the length of a name, and the tenth is 0.
    return len(head) == 10 and head[8:9] == b"{" and head[9] != 0


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(content: Content, path: str | os.PathLike[str]) -> None:
    """Write a file. An existing one stays as it was until the new one is complete.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    inputs = []
    for number, (key, parts) in enumerate(content.inputs.items()):
        entry = {
            "readers": [name for name, of in content.readers.items() if of == key],
            "key": key,
            "stacked": content.stacks[key],
            "columns": parts[0].total.columns,
            "counts": [part.total.count for part in parts],
            "first": [None if part.first is None else part.first.count for part in parts],
        }
        inputs.append(entry)
        for expert, part in enumerate(parts):
            part.finish()
            place = f"{number}.{expert}"
            _put(tensors, place, part.total)
            if part.first is not None:
                _put(tensors, f"{place}.first", part.first)
            if len(part.held):
                names = ("held", "held_weights", "held_first")
                values = (part.held.rows[0], part.held.weights[0], part.held.first[0])
                tensors |= {f"{place}.{name}": value for name, value in zip(names, values, strict=True)}
    others = []
    for number, (name, (squares, counts)) in enumerate(content.others.items()):
        tensors[f"other.{number}"] = squares
        others.append({"name": name, "counts": counts.tolist()})
    about = {"version": _VERSION, "inputs": inputs, "others": others, **content.facts}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(about)})


def _put(tensors: dict[str, Tensor], place: str, second: Second) -> None:
    if second.squares is not None:
        tensors[f"{place}.squares"] = second.squares
    if second.total is not None:
        tensors[f"{place}.total"] = second.total
    if second.rows:
        tensors[f"{place}.rows"] = second.rows[0]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Content:
    """Read a file; see `Moments.load` for errors."""
    return _Reader(Path(path)).content()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_file(path):
            raise ValueError(f"{path}: not a file of moments: it is not in the format safetensors")
        self.store = TensorStore([path])
        text = self.store.metadata.get(_KEY)
        if text is None:
            raise ValueError(f"{path}: not a file of moments: it has no entry {_KEY!r} in its metadata")
        if len(text) > _MOST_TEXT:
            raise self.error(f"its description has {len(text)} characters, the limit is {_MOST_TEXT}")
        try:
            self.about = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"its description is not JSON: {error}") from None
        if not isinstance(self.about, dict) or self.about.get("version") != _VERSION:
            version = self.about.get("version") if isinstance(self.about, dict) else None
            raise self.error(f"version {version!r:.40}; this isqtorch reads version {_VERSION}")

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}. The file is damaged; collect the moments again.")

    def content(self) -> Content:
        inputs: dict[str, list[Input]] = {}
        readers: dict[str, str] = {}
        stacks: dict[str, bool] = {}
        for number, entry in enumerate(self._list("inputs", _MOST_INPUTS)):
            what = f"input {number}"
            key = self._name(entry.get("key"), f"the key of {what}")
            if key in inputs:
                raise self.error(f"{what} has the key of another, {key!r:.80}")
            columns = self._integer(entry.get("columns"), f"the columns of {what}", 1, 1 << 24)
            stacks[key] = bool(entry.get("stacked"))
            counts, first = entry.get("counts"), entry.get("first")
            if not isinstance(counts, list) or not isinstance(first, list) or len(counts) != len(first):
                raise self.error(f"{what} has no lists of counts of the same length")
            if not 1 <= len(counts) <= (_MOST_EXPERTS if stacks[key] else 1):
                raise self.error(f"{what} has {len(counts)} experts")
            inputs[key] = [
                self._input(f"{number}.{expert}", columns, count, begins)
                for expert, (count, begins) in enumerate(zip(counts, first, strict=True))
            ]
            names = entry.get("readers")
            if not isinstance(names, list):
                raise self.error(f"{what} has no list of readers")
            for name in names:
                name = self._name(name, f"a reader of {what}")
                if name in readers:
                    raise self.error(f"{name!r:.80} reads two inputs")
                readers[name] = key
        others = {}
        for number, entry in enumerate(self._list("others", _MOST_INPUTS)):
            name = self._name(entry.get("name"), f"the name of entry {number}")
            counts = entry.get("counts")
            if not isinstance(counts, list) or not counts:
                raise self.error(f"{name!r:.80} has no counts")
            checked = [self._integer(count, f"a count of {name!r:.80}", 0, _MOST_COUNT) for count in counts]
            squares = self._tensor(f"other.{number}", None, (torch.float32,))
            others[name] = squares.clone(), torch.tensor(checked)
        return Content(inputs, readers, stacks, others, self._facts())

    def _input(self, place: str, columns: int, count: Any, begins: Any) -> Input:
        first = None if begins is None else self._second(f"{place}.first", columns, begins, sparse=True)
        held = HeldOut(columns)
        if f"{place}.held" in self.store.tensors:
            rows = self._tensor(f"{place}.held", (None, columns), (torch.float32, torch.float16, torch.bfloat16))
            if len(rows) > 2 * HELD_ROWS:
                raise self.error(f"{place}.held has {len(rows)} rows, the limit is {2 * HELD_ROWS}")
            weights = self._tensor(f"{place}.held_weights", (len(rows),), (torch.float32,)).clone()
            marks = self._tensor(f"{place}.held_first", (len(rows),), (torch.bool,)).clone()
            if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
                raise self.error(f"{place}.held_weights must be finite and not negative")
            held = HeldOut(columns, [rows], [weights], [marks])
        return Input(self._second(place, columns, count, sparse=False), first, held)

    def _second(self, place: str, columns: int, count: Any, sparse: bool) -> Second:
        out = Second(columns, sparse=sparse, count=self._integer(count, f"the count of {place}", 0, _MOST_COUNT))
        if not out.count:
            return out
        out.squares = self._tensor(f"{place}.squares", (columns,), (torch.float32,)).clone()
        if f"{place}.total" in self.store.tensors:
            out.total = self._tensor(f"{place}.total", (columns, columns), (torch.float32,))
        else:
            rows = self._tensor(f"{place}.rows", (None, columns), (torch.float32,))
            if len(rows) > columns:
                raise self.error(f"{place}.rows has {len(rows)} rows of {columns} columns, where a sum is smaller")
            out.rows = [rows]
        return out

    def _tensor(self, name: str, shape: tuple[int | None, ...] | None, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        if name not in self.store.tensors:
            raise self.error(f"it has no tensor {name!r}")
        tensor = self.store.read(name)
        fits = shape is None or (
            len(shape) == tensor.dim()
            and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
        )
        if not fits or tensor.dtype not in dtypes or not tensor.numel():
            raise self.error(f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, and must be {shape}")
        return tensor

    def _facts(self) -> dict[str, Any]:
        datasets = self.about.get("datasets")
        if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
            raise self.error("its datasets are no list of names")
        facts: dict[str, Any] = {"datasets": [name[:MAX_NAME_BYTES] for name in datasets[:100]]}
        for name in ("chunk_count", "chunk_size"):
            value = self.about.get(name)
            facts[name] = None if value is None else self._integer(value, name, 0, _MOST_COUNT)
        return facts

    def _list(self, name: str, most: int) -> list[dict[str, Any]]:
        found = self.about.get(name)
        if not isinstance(found, list) or len(found) > most or not all(isinstance(entry, dict) for entry in found):
            raise self.error(f"its {name} are no list of at most {most} entries")
        return found

    def _name(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not 1 <= len(value.encode(errors="replace")) <= MAX_NAME_BYTES:
            raise self.error(f"{what} must be a string of 1 to {MAX_NAME_BYTES} bytes")
        if not value.isprintable():
            raise self.error(f"{what} has unprintable characters: {value[:40]!r}")
        return value

    def _integer(self, value: Any, what: str, least: int, most: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(f"{what} is {value!r:.40}, must be a number from {least} to {most}")
        return value
