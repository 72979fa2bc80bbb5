"""What a quantized weight is made of: the format description and the registry.

A quantized matrix is one uint8 tensor `[N, row_bytes]`. Every row is a run of self-contained blocks; a block holds `block`
consecutive weights of that row and everything needed to decode them:

    row:    | block 0 | block 1 | ... | block K/block - 1 |
    block:  | scale(s), offset(s) | codes |                    `layout` names the parts in order

Formats say WHAT the bytes mean. How the integers are chosen is the quantizers' business (`isqtorch.quantizers`), found
through the name in `solver`; how fast it runs is the kernels'.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Fields = dict[str, Tensor]
"""The contents of n blocks, one tensor per field, first dimension n: codes as uint8 or int8 `[n, block]`, scales as they are
stored (f16 `[n]`, 6-bit integers `[n, sub_blocks]` as uint8, ...)."""

_PART = re.compile(r"(\w+):(u8|i8|i16|f16|bf16|f32)(?:\[(\d+)\])?")
_DTYPES = {
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
}


@dataclass(frozen=True)
class Part:
    """One member of the block struct: `count` values of `dtype`, starting `offset` bytes into the block."""

    name: str
    dtype: torch.dtype
    count: int  # 1 means a scalar: shape [n] instead of [n, count]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class QuantFormat(ABC):
    """One quantization format: its facts, and the three functions that give the bytes their meaning.

    A family (`formats/ggml.py`, `kquants.py`, ...) subclasses this once and registers one instance per format.
    """

    name: str  # canonical: registry key, name in the C++ lists, test id
    bits: int  # bits per code
    block: int  # weights per block, along K
    layout: str  # the block struct, e.g. "d:f16 qs:u8[16]"; little endian, no padding
    formula: str  # how a weight comes out of the fields, for people
    source: str  # where layout and quantizer are defined
    solver: str  # name of the quantizer family in isqtorch.quantizers
    takes_importance: bool = False  # whether the solver can weigh columns by an importance vector
    fallback: str | None = None  # the next larger format, for rows that `block` does not divide
    promoted: str | None = None  # what embeddings and output heads get instead; None: the format itself
    aliases: tuple[str, ...] = ()
    weight_error: float = 0.0  # upper bound of the relative RMS error on normally distributed weights
    activations: str | None = None  # what `linear` may round x to, besides: "fp8"
    linear_error: float = 0.012  # bound of the relative RMS error of `linear` against exact decoded weights

    # ---- facts -----------------------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """`layout`, parsed."""
        parts, offset = [], 0
        for item in self.layout.split():
            match = _PART.fullmatch(item)
            assert match, f"{self.name}: bad layout item {item!r}"
            name, dtype, count = match[1], _DTYPES[match[2]], int(match[3] or 1)
            parts.append(Part(name, dtype, count, offset))
            offset += parts[-1].nbytes
        return tuple(parts)

    @cached_property
    def block_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one packed row of `in_features` weights; ValueError if blocks do not fit it."""
        if in_features <= 0 or in_features % self.block:
            raise ValueError(
                f"{self.name}: in_features must be a positive multiple of {self.block}, got {in_features}. "
                f"Use a format with a smaller block{f' ({self.fallback})' if self.fallback else ''}, or leave this weight as it is."
            )
        return in_features // self.block * self.block_bytes

    def in_features(self, row_bytes: int) -> int:
        """K of a packed row; the inverse of `row_bytes`."""
        if row_bytes <= 0 or row_bytes % self.block_bytes:
            raise ValueError(
                f"{self.name}: a packed row must be a positive multiple of {self.block_bytes} bytes, got {row_bytes}. "
                "The weight was packed in another format, or cut inside a block."
            )
        return row_bytes // self.block_bytes * self.block

    def for_dtype(self, dtype: torch.dtype) -> QuantFormat:
        """The variant of this format that suits weights of `dtype`: only the affine family has more than one."""
        return self

    # ---- bytes <-> raw parts -----------------------------------------------------------------------------------------

    def split(self, blocks: Tensor) -> Fields:
        """Cut blocks into the parts of `layout`, uninterpreted.

        Args:
            blocks: uint8 `[n, block_bytes]`.

        Returns:
            One tensor per part, `[n]` or `[n, count]`, in the part's own dtype.
        """
        raw = {}
        for part in self.parts:
            # a copy, not .contiguous(): that keeps the offset and the strides of a single block, which view() may reject
            piece = blocks[:, part.offset : part.offset + part.nbytes].clone(memory_format=torch.contiguous_format)
            piece = piece.view(part.dtype)  # [n, count]
            raw[part.name] = piece if part.count > 1 else piece[:, 0]
        return raw

    def join(self, raw: Fields) -> Tensor:
        """The inverse of `split`: parts in, uint8 `[n, block_bytes]` out."""
        columns = []
        for part in self.parts:
            piece = raw[part.name].reshape(-1, part.count)
            assert piece.dtype == part.dtype, f"{self.name}.{part.name}: {piece.dtype} is not {part.dtype}"
            columns.append(piece.clone(memory_format=torch.contiguous_format).view(torch.uint8))
        return torch.cat(columns, dim=1)

    # ---- meaning -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def unpack(self, blocks: Tensor) -> Fields:
        """uint8 `[n, block_bytes]` -> fields, with one value per element for the codes. Exact."""

    @abstractmethod
    def pack(self, fields: Fields) -> Tensor:
        """The inverse of `unpack`, exactly."""

    @abstractmethod
    def decode(self, fields: Fields) -> Tensor:
        """Fields -> the weights they stand for, f32 `[n, block]`, with the roundings of the format's reference."""


_REGISTRY: dict[str, QuantFormat] = {}  # canonical name -> format
_ALIASES: dict[str, str] = {}  # lower-case spelling -> canonical name
_BASE: list[str] = []  # the names `formats()` lists: every family member once, without variants
_MIXES: dict[str, str] = {}  # lower-case spelling -> name of a rule for whole models


def register(fmt: QuantFormat, *, variant: bool = False) -> None:
    """Add a format. Variants (other group sizes, other scale types) work everywhere but are left out of `formats()`."""
    for spelling in (fmt.name, *fmt.aliases):
        assert spelling.lower() not in _ALIASES, f"format name {spelling!r} is taken"
        _ALIASES[spelling.lower()] = fmt.name
    _REGISTRY[fmt.name] = fmt
    if not variant:
        _BASE.append(fmt.name)


def register_mix(name: str, *aliases: str) -> None:
    """Reserve the name of a rule that gives the weights of a model different formats (`mixes.py`, "auto")."""
    for spelling in (name, *aliases):
        assert spelling not in _ALIASES and spelling not in _MIXES, f"format name {spelling!r} is taken"
        _MIXES[spelling] = name


def mix_name(spec: object) -> str | None:
    """The canonical name, if `spec` names a rule for whole models and not a format."""
    return _MIXES.get(spec.lower()) if isinstance(spec, str) else None


def formats(*, variants: bool = False) -> tuple[str, ...]:
    """Canonical names of all formats, in a fixed order; with `variants`, also other group sizes and scale types."""
    return tuple(_REGISTRY) if variants else tuple(_BASE)


def get_format(name: str | QuantFormat) -> QuantFormat:
    """The format of that name or alias, in any case; ValueError lists what exists."""
    if isinstance(name, QuantFormat):
        return name
    canonical = _ALIASES.get(name.lower()) if isinstance(name, str) else None
    if canonical is None and mix_name(name) is not None:
        raise ValueError(
            f"{name!r} is not a format but a rule that gives the layers of a whole model different ones: use it with quantize_, "
            f"IsqConfig or --isq. One weight needs one of {', '.join(formats())}."
        )
    if canonical is None:
        raise ValueError(
            f"unknown format {name!r}. Known formats: {', '.join(formats())} (see isqtorch.formats(variants=True))."
        )
    return _REGISTRY[canonical]
