"""compressed-tensors: integers in words or bytes, FP8, MXFP4 and NVFP4, by the names of the tensors.

A checkpoint may use several of them, for different layers. The tensors of a layer tell which one it is. Only the bits
of packed integers, and the size of blocks, come from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import FLOATS, Parts, StoredFiles, StoredMethod, StoredWeight, check_shape, check_type, companion
from .float4 import fp4_weight
from .float8 import CODES, fp8_weight, is_extra
from .integers import IntWeight, unpack_padded_words, unpack_words, words_of

_READ = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)


@dataclass(frozen=True)
class PackedWeight(IntWeight):
    """Parts `codes` [N, words], `scale` [N, groups], perhaps `zeros` [words, groups] and `index` [K]."""

    padded: bool  # words hold whole codes only

    def codes(self, parts: Parts) -> Tensor:
        return self._unpack(parts["codes"], self.shape[-1])

    def scales(self, parts: Parts) -> tuple[Tensor, Tensor]:
        rows = self.shape[-2]
        scales = parts["scale"].reshape(-1, parts["scale"].shape[-1]).expand(rows, -1)
        if "zeros" in parts:
            return scales, self._unpack(parts["zeros"].t(), rows).t()
        return scales, torch.full_like(scales, float(1 << self.width - 1))

    def groups(self, parts: Parts) -> Tensor | None:
        if "index" not in parts or bool((parts["index"] < 0).all()):  # -1: not used
            return None
        return parts["index"].long()

    def _unpack(self, words: Tensor, count: int) -> Tensor:
        return (unpack_padded_words if self.padded else unpack_words)(words, self.width, count)


@dataclass(frozen=True)
class ByteWeight(IntWeight):
    """Parts `codes` i8 [N, K], `scale` [N, groups], [N] or one, perhaps `zeros` i8 of the same shape."""

    def codes(self, parts: Parts) -> Tensor:
        return parts["codes"].view(torch.uint8) ^ 128

    def scales(self, parts: Parts) -> tuple[Tensor, Tensor]:
        scales = self._spread(parts["scale"])
        if "zeros" in parts:
            return scales, self._spread(parts["zeros"]).to(torch.int16) + 128
        return scales, torch.full_like(scales, 128.0)

    def _spread(self, values: Tensor) -> Tensor:
        rows = self.shape[-2]
        return values.reshape(1, 1).expand(rows, 1) if values.numel() == 1 else values.reshape(rows, -1)


class CompressedTensors(StoredMethod):
    """A checkpoint of compressed-tensors (llm-compressor, Neural Magic, Red Hat)."""

    name = "compressed-tensors"

    def __init__(self, entry: Mapping[str, Any]) -> None:
        groups = entry.get("config_groups") or {}
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise ValueError("quantization_config: config_groups must map names to groups")
        formats = {entry.get("format") or "dense", *(group.get("format") or "dense" for group in groups.values())}
        unknown = sorted(str(each) for each in formats if each not in _READ)
        if unknown:
            raise NotImplementedError(
                f"compressed-tensors of the format {unknown[0]!r:.80} are not read, only {', '.join(_READ)}. Decompress the checkpoint "
                "with its package."
            )
        sparsity = entry.get("sparsity_config") or {}
        kind = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
        if kind != "dense":
            raise NotImplementedError(
                f"compressed-tensors with sparse weights ({kind!r:.80}) are not read. Decompress the checkpoint with its package."
            )
        if entry.get("transform_config"):
            raise NotImplementedError(
                "compressed-tensors with transforms (rotated weights) are not read. Use a checkpoint without them."
            )
        self.widths: set[int] = set()
        self.block: tuple[int, int] | None = None
        for group in groups.values():
            scheme = group.get("weights") or {}
            if not isinstance(scheme, Mapping):
                raise ValueError("quantization_config: 'weights' of a group must be a scheme")
            bits, block = scheme.get("num_bits"), scheme.get("block_structure")
            if scheme.get("type", "int") == "int" and type(bits) is int and 1 <= bits <= 8:
                self.widths.add(bits)
            if isinstance(block, (list, tuple)) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
                self.block = block[0], block[1]

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        header = files.headers[name]
        if name.endswith("weight_packed"):
            stem = name.removesuffix("_packed")
            if header.dtype == torch.uint8:
                return fp4_weight(stem, name, files, self.name, divides=True)
            return self._packed(stem, name, files)
        if len(header.shape) < 2 or not name.endswith("weight"):
            return None
        if header.dtype in CODES:
            scale = companion(files, name, (f"{name}_scale",), self.name)
            return fp8_weight(name, scale, files, self.block, self.name)
        if header.dtype == torch.int8:
            scale = companion(files, name, (f"{name}_scale",), self.name)
            return bytes_weight(name, name, scale, f"{name}_zero_point", files, self.name)
        return None

    def is_extra(self, name: str) -> bool:
        leaf = name.rpartition(".")[2]
        ours = leaf.startswith("weight_") and leaf.removeprefix("weight_") in ("shape", "g_idx", "zero_point")
        return is_extra(name) or leaf in ("input_global_scale", "output_global_scale") or ours

    def _packed(self, stem: str, name: str, files: StoredFiles) -> StoredWeight:
        check_type(files, name, torch.int32)
        parts = {"codes": name, "scale": companion(files, name, (f"{stem}_scale",), self.name)}
        check_type(files, parts["scale"], *FLOATS)
        *lead, rows, words = files.headers[name].shape
        shape = self._shape(stem, files, (*lead, rows))
        columns = shape[-1]
        found = [
            (width, padded)
            for width in sorted(self.widths)
            for padded, size in ((False, words_of(columns, width)), (True, -(-columns // (32 // width))))
            if size == words
        ]
        if len({width for width, _ in found}) != 1:
            widths = " or ".join(map(str, sorted(self.widths))) or "no number of"
            raise ValueError(
                f"{name} is {[*lead, rows, words]}: {columns} columns in {words} words, which does not go with {widths} bits, as the "
                "configuration says. The checkpoint is damaged."
            )
        width, padded = found[0]
        groups = files.headers[parts["scale"]].shape[-1:]
        if not groups or not groups[0]:
            raise ValueError(f"{parts['scale']} has no columns. The checkpoint is damaged.")
        check_shape(files, parts["scale"], (*lead, rows, groups[0]), (*lead, 1, groups[0]), (1,))
        group = -(-columns // groups[0])
        if f"{stem}_zero_point" in files.headers:
            parts["zeros"] = f"{stem}_zero_point"
            check_type(files, parts["zeros"], torch.int32)
            short = -(-rows // (32 // width)) if padded else words_of(rows, width)
            check_shape(files, parts["zeros"], (*lead, short, groups[0]))
        if f"{stem}_g_idx" in files.headers:
            parts["index"] = f"{stem}_g_idx"
            check_type(files, parts["index"], torch.int32, torch.int64)
            check_shape(files, parts["index"], (*lead, columns))
        what = f"{self.name} ({width} bits, groups of {group})"
        return PackedWeight(stem, shape, parts, what, width, group, padded)

    def _shape(self, stem: str, files: StoredFiles, rows: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a packed weight, from its tensor `weight_shape`."""
        name = companion(files, f"{stem}_packed", (f"{stem}_shape",), self.name)
        check_type(files, name, torch.int64, torch.int32)
        check_shape(files, name, (len(rows) + 1,))
        shape = tuple(int(n) for n in files.read(name, None))
        if shape[:-1] != rows or shape[-1] < 1:
            raise ValueError(
                f"{name} says {list(shape)}, and {stem}_packed has {list(rows)} rows. The checkpoint is damaged."
            )
        return shape


def bytes_weight(name: str, codes: str, scale: str, zeros: str, files: StoredFiles, method: str) -> StoredWeight:
    """The weight of signed bytes.

    Args:
        name: of the weight in a checkpoint of floats.
        codes, scale: names of the tensors.
        zeros: name of the tensor of zero points, which may be missing.
        files: the checkpoint.
        method: for messages.
    """
    parts = {"codes": codes, "scale": scale}
    check_type(files, scale, *FLOATS)
    shape, scales = files.headers[codes].shape, files.headers[scale].shape
    if len(shape) != 2:
        raise ValueError(f"{codes} is {list(shape)}, must have two dimensions. The checkpoint is damaged.")
    groups = scales[1] if len(scales) == 2 and scales != (1, 1) else 1
    check_shape(files, scale, (), (1,), (1, 1), (shape[0],), (shape[0], max(groups, 1)))
    if zeros in files.headers:
        parts["zeros"] = zeros
        check_type(files, zeros, torch.int8)
        check_shape(files, zeros, scales)
    group = -(-shape[1] // groups)
    return ByteWeight(name, tuple(shape), parts, f"{method} (8 bits, groups of {group})", 8, group)
