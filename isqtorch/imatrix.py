"""Importance matrices: how much each input column of a layer matters when its weights are rounded.

The statistic is llama.cpp's: the mean over tokens of the squared input of a column. It is kept as sums and counts, because
two of the three file formats store them so; the weights that quantizers use are sums / counts.

    llama.cpp, GGUF       f32 tensors "<name>.in_sum2" [K] or [E, K] (sums) and "<name>.counts" [1] or [E] (tokens)
    llama.cpp, legacy     i32 n | n x (i32 length, name | i32 ncall | i32 nval | f32 sums[nval]) | optional trailer:
                          i32 last_chunk | i32 length, dataset        weights = sums / ncall, experts one after another
    mistral.rs .cimatrix  u64 n | n x (u64 length, name | u64 nval | f32 weights[nval])

A file is recognised by its content. The last two have no magic, but never look alike: bytes 4 to 7 are the length of the
first name in a legacy file, so not 0, and the upper half of the number of entries in the other, so 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import inf, prod

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from isqtorch.binary import MAX_NAME_BYTES, BinaryReader, open_binary
from isqtorch.gguf_file import MAGIC, GgufFile, GgufTensor
from isqtorch.gguf_names import gguf_names

_MAX_ENTRIES = 1 << 17  # far above any real file, quick to loop over
_SUMS, _COUNTS = ".in_sum2", ".counts"
_GGUF_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")


class Imatrix(Mapping[str, Tensor]):
    """A read-only mapping from layer name to its ready-to-use weights, f32 `[K]` or `[E, K]` on the CPU.

    `vector` is the way to look a layer up: it knows the names that other programs use, and checks the length.

    Attributes:
        sums: what the file stores, f32 `[K]`, `[E, K]`, or `[E * K]` where it does not tell experts apart.
        counts: what to divide it by, int64 `[1]` or `[E]`: tokens in a GGUF file, calls in a legacy one, 1 otherwise.
        source: where it comes from, for messages.
        format: "gguf", "legacy", "cimatrix", or None where it was not read from a file.
        chunk_count, chunk_size, datasets: what the file says about the calibration run; None or () where it does not.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor | ArrayLike],
        counts: Mapping[str, Tensor] | None = None,
        *,
        source: str = "imatrix",
        format: str | None = None,
        chunk_count: int | None = None,
        chunk_size: int | None = None,
        datasets: tuple[str, ...] = (),
    ) -> None:
        """Check and keep sums; without `counts` they are the weights themselves.

        Raises:
            ValueError: a bad name, an empty vector, more than two dimensions, a negative or non-finite number, or
                counts that do not fit.
        """
        self.source = source
        self.format = format
        self.chunk_count = chunk_count
        self.chunk_size = chunk_size
        self.datasets = datasets
        self.sums = {name: self._checked_sums(name, value) for name, value in sums.items()}
        self.counts = {name: self._checked_counts(name, (counts or {}).get(name)) for name in self.sums}

    def __getitem__(self, name: str) -> Tensor:
        sums, counts = self.sums[name], self.counts[name]
        divisor = counts.to(torch.float32)
        if sums.ndim == 2:
            divisor = divisor[:, None]  # [E, 1]
        return torch.where(divisor > 0, sums / divisor, 1.0)  # no data: every column matters the same

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    def __repr__(self) -> str:
        return f"Imatrix({len(self)} entries from {self.source})"

    def vector(self, layer: str, in_features: int, experts: int | None = None) -> Tensor | None:
        """The weights for one layer.

        Args:
            layer: path of the module (or, for stacked experts, of the parameter) in the model.
            in_features: K, the number of columns.
            experts: E for a stack of experts, None for a matrix.

        Returns:
            f32 `[K]`; with `experts` `[E, K]`, or `[K]` where the entry does not tell them apart; None if nothing is known
            about the layer.

        Raises:
            ValueError: there is an entry, but its length is wrong.
        """
        name, expert = self._find(layer)
        if name is None:
            return None
        shape = (in_features,) if experts is None else (experts, in_features)
        weights = self[name]
        if expert is not None and experts is None:  # one of a list of experts: the entry holds all of them
            if in_features and weights.shape[-1] % in_features == 0 and expert * in_features < weights.numel():
                weights = weights.reshape(-1, in_features)[expert]
        if experts is not None and weights.shape == (in_features,):
            shape = (in_features,)  # one vector for all experts
        if weights.numel() != prod(shape) or (weights.ndim == 2 and weights.shape[1] != in_features):
            raise self._misfit(layer, name, shape)
        weights = weights.reshape(shape)
        if self.format == "cimatrix" and (experts is not None or expert is not None):
            unused = (weights == 0).all(dim=-1, keepdim=True)  # mistral.rs stores zeros for experts without data
            weights = torch.where(unused, 1.0, weights)
        return weights

    def _find(self, layer: str) -> tuple[str | None, int | None]:
        """The entry that applies to a layer, and which expert in it."""
        candidates, expert = gguf_names(layer)
        for name in (layer, f"{layer}.weight"):
            if name in self.sums:
                return name, None
        return next((name for name in candidates if name in self.sums), None), expert

    def _misfit(self, layer: str, name: str, shape: tuple[int, ...]) -> ValueError:
        want, got = (" x ".join(map(str, dims)) for dims in (shape, self.sums[name].shape))
        return ValueError(
            f"{self.source}: layer {layer!r} needs {want} importance values, entry {name!r} has {got}. "
            "The importance matrix was made for another model; use the right one, or none."
        )

    def _error(self, name: str, message: str) -> ValueError:
        return ValueError(f"{self.source}: entry {name[:80]!r}: {message}")

    def _checked_sums(self, name: str, value: Tensor | ArrayLike) -> Tensor:
        if not isinstance(name, str) or not name or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
            raise ValueError(
                f"{self.source}: the name of an entry must be a string of 1 to {MAX_NAME_BYTES} bytes, got {name!r:.80}"
            )
        try:
            sums = torch.as_tensor(value).detach().to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._error(name, f"not a tensor of numbers: {error}") from None
        if sums.ndim not in (1, 2) or sums.numel() == 0:
            raise self._error(name, f"shape {list(sums.shape)}, must be [columns] or [experts, columns]")
        low, high = torch.aminmax(sums)
        if not (low >= 0 and high < inf):  # also false for NaN
            position = int(torch.nonzero(~(torch.isfinite(sums) & (sums >= 0)).flatten())[0])
            bad = sums.flatten()[position].item()
            raise self._error(name, f"value {position} is {bad}, must be finite and not negative")
        return sums

    def _checked_counts(self, name: str, counts: Tensor | None) -> Tensor:
        sums = self.sums[name]
        experts = sums.shape[0] if sums.ndim == 2 else 1
        if counts is None:
            return torch.ones(experts, dtype=torch.int64)
        if counts.shape != (experts,):
            raise self._error(name, f"counts have shape {list(counts.shape)}, must be [{experts}]")
        return counts.to("cpu", torch.int64)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix written by llama.cpp (GGUF or legacy) or mistral.rs (.cimatrix).

    The kind is found from the content, never from the name. The whole file is checked before a value is used, and memory
    stays within a small multiple of the size of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an importance matrix, or a damaged one; says where and what.
    """
    with open_binary(path) as reader:
        head = reader.take(min(8, reader.size), "start of the file")
        reader.seek(0)
        if head[:4] == MAGIC:
            kind, read = "a GGUF importance matrix", _read_gguf
        elif head[4:] == bytes(4):
            kind, read = "a mistral.rs .cimatrix", _read_cimatrix
        else:
            kind, read = "a legacy llama.cpp importance matrix", _read_legacy
        try:
            return read(reader)
        except ValueError as error:
            raise ValueError(f"{error} (reading it as {kind})") from None


def _read_legacy(reader: BinaryReader) -> Imatrix:
    sums: dict[str, NDArray[np.float32]] = {}
    counts: dict[str, Tensor] = {}
    for _ in range(reader.count("i32", "number of entries", 17, _MAX_ENTRIES, least=1)):
        name = _new_name(reader, "i32", sums)
        calls = reader.integer("i32", f"number of calls of {name!r}")
        if calls < 0:
            raise reader.error(f"number of calls of {name!r} is {calls}, must not be negative", reader.position - 4)
        counts[name] = torch.tensor([max(calls, 1)])  # llama.cpp takes the values as they are where it is 0
        sums[name] = _values(reader, "i32", name)
    chunk_count, dataset = None, ""
    if reader.remaining:
        chunk_count = reader.integer("i32", "number of the last chunk")
        dataset = reader.text("i32", "name of the dataset")
    _expect_end(reader)
    datasets = (dataset,) if dataset else ()
    return Imatrix(sums, counts, source=reader.path, format="legacy", chunk_count=chunk_count, datasets=datasets)


def _read_cimatrix(reader: BinaryReader) -> Imatrix:
    sums: dict[str, NDArray[np.float32]] = {}
    for _ in range(reader.count("u64", "number of entries", 21, _MAX_ENTRIES, least=1)):
        name = _new_name(reader, "u64", sums)
        sums[name] = _values(reader, "u64", name)
    _expect_end(reader)
    return Imatrix(sums, source=reader.path, format="cimatrix")


def _new_name(reader: BinaryReader, kind: str, seen: Mapping[str, object]) -> str:
    at = reader.position
    name = reader.name(kind, f"name of entry {len(seen)}")
    if name in seen:
        raise reader.error(f"entry {name!r} appears twice", at)
    return name


def _values(reader: BinaryReader, kind: str, name: str) -> NDArray[np.float32]:
    what = f"values of entry {name!r}"
    return reader.floats(reader.count(kind, f"number of {what}", item_bytes=4, least=1), what)


def _expect_end(reader: BinaryReader) -> None:
    if reader.remaining:
        raise reader.error(f"{reader.remaining} bytes follow the last entry")


def _read_gguf(reader: BinaryReader) -> Imatrix:
    file = GgufFile(reader)
    content = file.metadata.get("general.type")
    if content != "imatrix":
        raise reader.error(f"metadata 'general.type' is {content!r:.80}, must be 'imatrix'")
    datasets, chunk_count, chunk_size = (file.metadata.get(key) for key in _GGUF_KEYS)
    if not isinstance(datasets, list):
        raise reader.error(f"metadata {_GGUF_KEYS[0]!r} must be a list of strings, is {datasets!r:.80}")
    if not isinstance(chunk_count, int) or chunk_count < 0:
        raise reader.error(f"metadata {_GGUF_KEYS[1]!r} must be a number of chunks, is {chunk_count!r:.80}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise reader.error(f"metadata {_GGUF_KEYS[2]!r} must be a number of tokens, is {chunk_size!r:.80}")

    pairs = _gguf_pairs(reader, file)
    values = file.read_f32(tensor for pair in pairs.values() for tensor in pair)
    sums, counts = {}, {}
    for name, (sum_info, count_info) in pairs.items():
        columns, experts = sum_info.dims[0], values[count_info.name].size
        shape = (experts, columns) if experts > 1 else (columns,)
        sums[name] = values.pop(sum_info.name).reshape(shape)
        counts[name] = _token_counts(reader, count_info, values.pop(count_info.name))
    return Imatrix(
        sums,
        counts,
        source=reader.path,
        format="gguf",
        chunk_count=chunk_count,
        chunk_size=chunk_size,
        datasets=tuple(datasets),
    )


def _gguf_pairs(reader: BinaryReader, file: GgufFile) -> dict[str, tuple[GgufTensor, GgufTensor]]:
    """The directory lines of sums and counts, by the name of the weight; other tensors are ignored, as llama.cpp does."""
    tensors = file.tensors
    pairs = {}
    for name in dict.fromkeys(full.rpartition(".")[0] for full in tensors if full.endswith((_SUMS, _COUNTS))):
        sums, counts = tensors.get(name + _SUMS), tensors.get(name + _COUNTS)
        if sums is None or counts is None:
            raise reader.error(f"tensor {name + (_SUMS if sums is None else _COUNTS)!r} is missing")
        # Trailing dims of 1 are not stored: [K, 1] is [K].
        rows = (sums.dims[1:] + (1, 1, 1))[:3]
        if counts.dims[0] != 1 or (counts.dims[1:] + (1, 1, 1))[:3] != rows or rows[1:] != (1, 1):
            raise reader.error(
                f"tensors {sums.name!r} {list(sums.dims)} and {counts.name!r} {list(counts.dims)} must have shapes "
                "[columns, experts] and [1, experts]",
                sums.at,
            )
        pairs[name] = sums, counts
    if not pairs:
        raise reader.error("there are no entries")
    return pairs


def _token_counts(reader: BinaryReader, info: GgufTensor, values: NDArray[np.float32]) -> Tensor:
    """Token counts, stored as f32 `[E]`, as int64."""
    bad = ~((values >= 0) & (values < 2.0**62))  # NaN too
    if bad.any():
        position = int(bad.argmax())
        raise reader.error(f"tensor {info.name!r}: count {position} is {values[position]:g}", info.at)
    return torch.from_numpy(np.rint(values).astype(np.int64))
