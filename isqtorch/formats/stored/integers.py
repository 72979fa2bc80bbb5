"""Integer codes with a scale and a zero point for each group of columns: w = (q - zero) * scale.

GPTQ, AWQ, compressed-tensors and HQQ mean the same and differ in the order of bits and dimensions. The format hqq holds
all of it without rounding, if groups are whole blocks and scales and zeros are numbers of f16.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch.formats.base import QuantFormat, get_format
from isqtorch.formats.bitstream import unpack_stream

from .base import Kept, Parts, StoredFiles, StoredWeight

_BLOCKS = (128, 64, 32)  # of hqq, the one with the fewest scales first


@dataclass(frozen=True)
class IntWeight(StoredWeight):
    """A weight of integers.

    Attributes:
        width: bits of a code.
        group: columns that share a scale, from the first on.
    """

    width: int
    group: int

    @property
    def bits(self) -> int:  # type: ignore[override]  # of the instance
        return self.width

    @abstractmethod
    def codes(self, parts: Parts) -> Tensor:
        """The codes: uint8 `[N, K]`."""

    @abstractmethod
    def scales(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Scales and zeros, in a float type or as integers: `[N, groups]`."""

    def groups(self, parts: Parts) -> Tensor | None:
        """The group of each column, int64 `[K]`; None if groups are runs of `group` columns."""
        return None

    def small(self) -> tuple[str, ...]:
        """The roles of the parts that `scales` and `groups` read."""
        return tuple(role for role in self.parts if role != "codes")

    def decode(self, parts: Parts) -> Tensor:
        out = self.codes(parts).to(torch.float32)
        scales, zeros = (each.to(torch.float32) for each in self._checked(parts))
        index = self._scattered(parts)
        columns = out.shape[1]
        if index is None and columns % self.group == 0:
            grouped = out.view(out.shape[0], -1, self.group)
            grouped.sub_(zeros[..., None]).mul_(scales[..., None])
            return out
        if index is None:
            index = torch.arange(columns) // self.group
        elif index.numel() and (int(index.min()) < 0 or int(index.max()) >= scales.shape[1]):
            raise ValueError(f"{self.name}: a column is in a group that does not exist. The checkpoint is damaged.")
        return out.sub_(zeros[:, index]).mul_(scales[:, index])

    def kept(self, files: StoredFiles) -> Kept:
        columns = self.shape[-1]
        blocks = [n for n in _BLOCKS if columns % n == 0 and (self.group % n == 0 or self.group >= columns)]
        if not blocks:
            return Kept((), f"groups of {self.group} columns are no blocks of hqq")
        for expert in range(self.shape[0]) if len(self.shape) == 3 else (None,):
            parts = self.matrix(files, expert, self.small())
            if self._scattered(parts) is not None:
                return Kept((), "the columns of a group are scattered (act-order)")
            scales, zeros = self._checked(parts)
            for each, name in ((scales, "scales"), (zeros, "zero points")):
                if not torch.equal(each.half().double(), each.double()):
                    return Kept((), f"some of its {name} are no numbers of f16")
            if bool((scales < 0).any()):
                return Kept((), "some of its scales are negative")
        names = [
            f"hqq{bits}" + ("" if block == 64 else f"g{block}")
            for bits in (4, 8)
            if bits >= self.width
            for block in blocks
        ]
        return Kept(tuple(map(get_format, names)))

    def blocks(self, parts: Parts, fmt: QuantFormat) -> Tensor:
        rows, columns = self.shape[-2:]
        index = torch.arange(0, columns, fmt.block) // self.group
        scales, zeros = (each[:, index].half().reshape(-1) for each in self._checked(parts))
        codes = self.codes(parts).reshape(-1, fmt.block)
        if fmt.bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        return fmt.join({"scale": scales, "zero": zeros, "qs": codes}).reshape(rows, -1)

    def _scattered(self, parts: Parts) -> Tensor | None:
        """The group of each column, if groups are not runs of `group` columns."""
        index = self.groups(parts)
        if index is None or torch.equal(index, torch.arange(self.shape[-1]) // self.group):
            return None
        return index

    def _checked(self, parts: Parts) -> tuple[Tensor, Tensor]:
        scales, zeros = self.scales(parts)
        wanted = (self.shape[-2], -(-self.shape[-1] // self.group))
        for each, what in ((scales, "scales"), (zeros, "zero points")):
            if tuple(each.shape) != wanted:
                raise ValueError(
                    f"{self.name} has {what} of shape {list(each.shape)}, must be {list(wanted)}. The checkpoint is damaged."
                )
            if not bool(torch.isfinite(each).all()):
                raise ValueError(f"{self.name} has {what} that are not finite. The checkpoint is damaged.")
        return scales, zeros


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes from 32-bit words, which are one stream of bits from the lowest on: int32 `[n, words]` -> uint8 `[n, count]`."""
    octets = words.contiguous().view(torch.uint8)
    if bits in (1, 2, 4, 8):  # the stream in general needs 64-bit numbers
        mask = (1 << bits) - 1
        return torch.stack([octets >> shift & mask for shift in range(0, 8, bits)], -1).flatten(1)[:, :count]
    whole = -(-count // 8) * bits  # bytes of whole runs of eight codes
    if octets.shape[1] < whole:
        octets = torch.nn.functional.pad(octets, (0, whole - octets.shape[1]))
    return unpack_stream(octets[:, :whole].contiguous(), bits)[:, :count]


def unpack_padded_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes from 32-bit words that hold whole codes only; the highest bits of a word may be unused."""
    each = 32 // bits
    codes = torch.stack([words >> bits * i & (1 << bits) - 1 for i in range(each)], -1)
    return codes.flatten(-2)[:, :count].to(torch.uint8)


def words_of(count: int, bits: int) -> int:
    """Number of 32-bit words that a stream of codes fills."""
    return -(-count * bits // 32)
