"""GPTQ and AWQ: codes and zero points in 32-bit words, with the input features first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import FLOATS, Parts, StoredFiles, StoredMethod, StoredWeight, check_shape, check_type, companion
from .integers import IntWeight, unpack_words, words_of

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word belongs to this one of its eight columns


@dataclass(frozen=True)
class GptqWeight(IntWeight):
    """Parts `codes` [K * bits / 32, N], `zeros` [groups, N * bits / 32], `scale` [groups, N], perhaps `index` [K]."""

    zeros_less_one: bool  # the checkpoint stores zero - 1

    def codes(self, parts: Parts) -> Tensor:
        return unpack_words(parts["codes"].t(), self.width, self.shape[1])

    def scales(self, parts: Parts) -> tuple[Tensor, Tensor]:
        words = parts["zeros"]
        if self.zeros_less_one and self.width != 3:
            # GPTQModel subtracts from whole words, and a zero of 0 borrows from its neighbour: adding gives it back.
            words = words + sum(1 << shift for shift in range(0, 32, self.width))
        zeros = unpack_words(words, self.width, self.shape[0])
        if self.zeros_less_one and self.width == 3:  # here it subtracts from each
            zeros = zeros + 1 & 7
        return parts["scale"].t(), zeros.t()

    def groups(self, parts: Parts) -> Tensor | None:
        return parts["index"].long() if "index" in parts else None


class Gptq(StoredMethod):
    """GPTQ as AutoGPTQ and GPTQModel write it: `qweight`, `qzeros`, `scales`, and `g_idx`."""

    name = "gptq"

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.width = checked_bits(entry, "bits", (2, 3, 4, 8))
        kind = str(entry.get("checkpoint_format") or "gptq")
        if kind not in ("gptq", "gptq_v2") or entry.get("is_marlin_format"):
            raise NotImplementedError(
                f"a GPTQ checkpoint of the format {kind if kind not in ('gptq', 'gptq_v2') else 'marlin'!r:.80} is not read, only 'gptq' "
                "and 'gptq_v2'. Convert it with the package that has written it."
            )
        words = str(entry.get("pack_dtype") or "int32").removeprefix("torch.")
        if words != "int32":
            raise NotImplementedError(f"GPTQ codes in words of {words:.80} are not read, only int32")
        self.less_one = kind == "gptq"

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        parts = _named_parts(name, files, self.name)
        if parts is None:
            return None
        stem, shape = name.removesuffix("qweight"), files.headers[name].shape
        if len(shape) != 2:
            raise ValueError(f"{name} is {list(shape)}, must have two dimensions. The checkpoint is damaged.")
        width, columns = self.width, 32 * shape[0] // self.width
        if f"{stem}g_idx" in files.headers:
            parts["index"] = f"{stem}g_idx"
            check_type(files, parts["index"], torch.int32, torch.int64)
            length = files.headers[parts["index"]].shape
            if len(length) != 1 or not length[0] or 32 * shape[0] % length[0]:
                raise ValueError(
                    f"{parts['index']} is {list(length)}, and {name} {list(shape)}. The checkpoint is damaged."
                )
            columns, width = length[0], 32 * shape[0] // length[0]  # layers may have bits of their own
            if width not in (2, 3, 4, 8):
                raise ValueError(f"{name} has {width} bits for each of {columns} columns. The checkpoint is damaged.")
        rows, groups = shape[1], files.headers[parts["scale"]].shape[0]
        group = -(-columns // max(groups, 1))
        check_shape(files, parts["scale"], (-(-columns // group), rows))
        check_shape(files, parts["zeros"], (groups, words_of(rows, width)))
        what = f"{self.name} ({width} bits, groups of {group})"
        return GptqWeight(f"{stem}weight", (rows, columns), parts, what, width, group, self.less_one)


@dataclass(frozen=True)
class AwqWeight(IntWeight):
    """Parts `codes` [K, N / 8], `zeros` [groups, N / 8], `scale` [groups, N]."""

    def codes(self, parts: Parts) -> Tensor:
        return _awq(parts["codes"]).t()

    def scales(self, parts: Parts) -> tuple[Tensor, Tensor]:
        return parts["scale"].t(), _awq(parts["zeros"]).t()


def _awq(words: Tensor) -> Tensor:
    """int32 `[n, words]` -> uint8 `[n, 8 words]`, with the columns in order."""
    codes = unpack_words(words, 4, 8 * words.shape[1]).view(words.shape[0], -1, 8)
    return codes[..., torch.tensor(_AWQ_COLUMNS).argsort()].flatten(1)


class Awq(StoredMethod):
    """AWQ in the layout "gemm": `qweight`, `qzeros` and `scales`."""

    name = "awq"

    def __init__(self, entry: Mapping[str, Any]) -> None:
        checked_bits(entry, "bits", (4,))
        version = entry.get("version", "gemm")
        kind = str(getattr(version, "value", version)).lower()
        if kind != "gemm":
            raise NotImplementedError(
                f"an AWQ checkpoint of the version {kind!r:.80} is not read, only 'gemm'. Convert it with the package that has written it."
            )

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        parts = _named_parts(name, files, self.name)
        if parts is None:
            return None
        stem, shape = name.removesuffix("qweight"), files.headers[name].shape
        scales = files.headers[parts["scale"]].shape
        if len(shape) != 2 or len(scales) != 2 or not scales[0] or shape[0] % scales[0]:
            raise ValueError(
                f"{parts['scale']} is {list(scales)}, which are not the scales of {name} {list(shape)}. The checkpoint is damaged."
            )
        columns, rows = shape[0], 8 * shape[1]
        check_shape(files, parts["scale"], (scales[0], rows))
        check_shape(files, parts["zeros"], (scales[0], shape[1]))
        group = columns // scales[0]
        return AwqWeight(f"{stem}weight", (rows, columns), parts, f"{self.name} (4 bits, groups of {group})", 4, group)


def _named_parts(name: str, files: StoredFiles, method: str) -> dict[str, str] | None:
    """The tensors beside `NAME.qweight`, with checked types; None if the name is another one."""
    if not name.endswith(".qweight"):
        return None
    stem = name.removesuffix("qweight")
    parts = {"codes": name}
    for role, leaf in (("zeros", "qzeros"), ("scale", "scales")):
        parts[role] = companion(files, name, (f"{stem}{leaf}",), method)
    check_type(files, name, torch.int32)
    check_type(files, parts["zeros"], torch.int32)
    check_type(files, parts["scale"], *FLOATS)
    return parts


def checked_bits(entry: Mapping[str, Any], option: str, known: tuple[int, ...]) -> int:
    """A number of bits from an entry; ValueError unless it is known."""
    bits = entry.get(option)
    if type(bits) is not int or bits not in known:
        raise ValueError(
            f"quantization_config: {option} is {bits!r:.80}, must be {' or '.join(map(str, known))}, the bits that are read here"
        )
    return bits
