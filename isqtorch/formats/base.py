"""The description of a quantization format, and the registry of all formats.

A quantized matrix is one uint8 tensor `[N, row_bytes]`. Every row is a sequence of self-contained blocks. A block holds
`block` consecutive weights of the row and everything needed to decode them:

    row:    | block 0 | block 1 | ... | block K/block - 1 |
    block:  | scale(s), offset(s) | codes |                    `layout` names the parts in order

A format defines what the bytes mean. A quantizer (`isqtorch.quantizers`) chooses the integers; `solver` is its name.
The native kernels in csrc/ implement both.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import plausible
from .words import meant

Fields = dict[str, Tensor]
"""The contents of n blocks, one tensor per field, first dimension n.

Codes are uint8 or int8 `[n, block]`. Scales have the type they are stored in: f16 `[n]`, 6-bit integers as uint8
`[n, sub_blocks]`, ...
"""

_PART = re.compile(r"(\w+):(u8|i8|i16|f16|bf16|f32|e8m0)(?:\[(\d+)\])?")
_DTYPES = {
    "e8m0": torch.uint8,
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
    exponents: bool = False  # bytes that stand for powers of two, 255 for NaN (e8m0)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def real(self) -> bool:
        """Whether the part holds real numbers, not integers."""
        return self.dtype.is_floating_point or self.exponents

    def numbers(self, blocks: Tensor) -> NDArray[np.float32]:
        """Read the first number of this part of each block: uint8 `[n, block_bytes]` on the CPU -> f32 `[n]`.

        The smallest power of two counts as zero: it is the scale of blocks of zeros.
        """
        if not self.exponents:
            return plausible.as_f32(blocks, self.offset, self.dtype)
        e = blocks[:, self.offset].numpy()
        powers = np.ldexp(np.float32(1), np.minimum(e, 254).astype(np.int32) - 127).astype(np.float32)
        return np.where(e == 0, np.float32(0), np.where(e == 255, np.float32(np.nan), powers))


@dataclass(frozen=True)
class QuantFormat(ABC):
    """One quantization format: its properties, and the three functions that define its bytes (unpack, pack, decode).

    `get_format` returns the instances. Each family of formats (`formats/ggml.py`, `formats/kquants.py`, ...) subclasses
    this class and registers one instance per format.

    Attributes:
        name: canonical name: registry key, name in the C++ lists, test id.
        bits: bits per code, without scales (see `bits_per_weight`).
        block: weights per block, along K.
        layout: the block struct, such as "d:f16 qs:u8[16]"; little endian, no padding.
        formula: how a weight is computed from the fields, for readers.
        source: where layout and quantizer are defined.
        solver: name of the quantizer family in `isqtorch.quantizers`.
        takes_importance: whether the default rule of the solver weighs columns by an importance vector.
        fallback: name of a format with a smaller block, for rows that `block` does not divide; None if there is none.
        promoted: name of the format that embeddings and output heads get instead; None if they get this format.
        aliases: other spellings of the name.
        weight_error: upper bound of the relative RMS error of normally distributed weights.
        activations: "fp8" if `linear` may also round x to FP8 (only if the user allows it), else None.
        linear_error: upper bound of the relative RMS error of `linear` against the product with decoded weights.
        never_negative: names of the parts of `layout` whose values are never negative, see `fault`.
        offset: name of the part of `layout` that moves the codes (a minimum, bias or zero point); None if there is none.

    Example:
        fmt = isqtorch.get_format("q4k")
        print(fmt.bits_per_weight, fmt.block, fmt.row_bytes(4096))  # 4.5 256 2304
    """

    name: str
    bits: int
    block: int
    layout: str
    formula: str
    source: str
    solver: str
    takes_importance: bool = False
    fallback: str | None = None
    promoted: str | None = None
    aliases: tuple[str, ...] = ()
    weight_error: float = 0.0
    activations: str | None = None
    linear_error: float = 0.012
    never_negative: tuple[str, ...] = ()
    offset: str | None = None

    # ---- facts -----------------------------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The members of the block struct: `layout`, parsed."""
        parts, offset = [], 0
        for item in self.layout.split():
            match = _PART.fullmatch(item)
            assert match, f"{self.name}: bad layout item {item!r}"
            name, dtype, count = match[1], _DTYPES[match[2]], int(match[3] or 1)
            parts.append(Part(name, dtype, count, offset, match[2] == "e8m0"))
            offset += parts[-1].nbytes
        return tuple(parts)

    @cached_property
    def block_bytes(self) -> int:
        """Size of one block in bytes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales and offsets."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, in_features: int) -> int:
        """Return the bytes of one packed row of `in_features` weights. Raise ValueError unless `block` divides them."""
        if in_features <= 0 or in_features % self.block:
            raise ValueError(
                f"{self.name}: in_features must be a positive multiple of {self.block}, got {in_features}. "
                f"Use a format with a smaller block{f' ({self.fallback})' if self.fallback else ''}, or leave this weight as it is."
            )
        return in_features // self.block * self.block_bytes

    def in_features(self, row_bytes: int) -> int:
        """Return K of a packed row of `row_bytes` bytes. Raise ValueError unless the row consists of whole blocks."""
        if row_bytes <= 0 or row_bytes % self.block_bytes:
            raise ValueError(
                f"{self.name}: a packed row must be a positive multiple of {self.block_bytes} bytes, got {row_bytes}. "
                "The weight was packed in another format, or cut inside a block."
            )
        return row_bytes // self.block_bytes * self.block

    def for_dtype(self, dtype: torch.dtype) -> QuantFormat:
        """Return the variant of this format for weights of `dtype`. Only the affine family has variants."""
        return self

    # ---- bytes <-> raw parts -----------------------------------------------------------------------------------------

    def split(self, blocks: Tensor) -> Fields:
        """Cut blocks into the parts of `layout`, without interpreting them.

        Args:
            blocks: uint8 `[n, block_bytes]`.

        Returns:
            One tensor per part, `[n]` or `[n, count]`, in the part's own dtype.
        """
        raw = {}
        for part in self.parts:
            # clone(), because .contiguous() keeps the offset and strides of a single block, which view() may reject
            piece = blocks[:, part.offset : part.offset + part.nbytes].clone(memory_format=torch.contiguous_format)
            piece = piece.view(part.dtype)  # [n, count]
            raw[part.name] = piece if part.count > 1 else piece[:, 0]
        return raw

    def join(self, raw: Fields) -> Tensor:
        """Join parts to blocks, uint8 `[n, block_bytes]`; the inverse of `split`."""
        columns = []
        for part in self.parts:
            piece = raw[part.name].reshape(-1, part.count)
            assert piece.dtype == part.dtype, f"{self.name}.{part.name}: {piece.dtype} is not {part.dtype}"
            columns.append(piece.clone(memory_format=torch.contiguous_format).view(torch.uint8))
        return torch.cat(columns, dim=1)

    def fault(self, blocks: Tensor) -> str | None:
        """Say why blocks cannot hold real weights in this format, or return None if they can.

        Bytes of another format or of a damaged file are noticed by their scales and offsets; see `plausible`. None is no
        proof: some formats differ only in the order of their codes.

        Args:
            blocks: uint8 `[n, block_bytes]`, a sample of a weight, on the CPU.
        """
        parts = {part.name: part.numbers(blocks) for part in self.parts if part.real}
        return plausible.fault(parts, self.never_negative, self.offset, 1 << self.bits, self.offset_in_steps)

    @property
    def offset_in_steps(self) -> bool:
        """Whether the offset counts steps of the scale; else it has the unit of the weights."""
        return False

    @property
    def offset_times_integers(self) -> bool:
        """Whether integers of the block multiply the offset, as they multiply the scale."""
        return False

    @property
    def codes(self) -> Sequence[int]:
        """The codes that a quantizer may choose, in the order of the weights they stand for.

        The order of the weights is reversed where the scale is negative.
        """
        return range(1 << self.bits)

    def with_codes(self, fields: Fields, q: Tensor) -> Fields:
        """Return blocks with other codes and the same scales. Formats that store sums of their codes adapt them.

        Args:
            fields: the fields of blocks.
            q: the new codes, of the shape and type of `fields["q"]`.
        """
        return {**fields, "q": q}

    # ---- meaning -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def unpack(self, blocks: Tensor) -> Fields:
        """Convert blocks, uint8 `[n, block_bytes]`, to fields. Every code becomes one element. Exact."""

    @abstractmethod
    def pack(self, fields: Fields) -> Tensor:
        """Convert fields to blocks, uint8 `[n, block_bytes]`; the exact inverse of `unpack`."""

    @abstractmethod
    def decode(self, fields: Fields) -> Tensor:
        """Compute the weights of n blocks from their fields: f32 `[n, block]`, rounded as in the format's source."""


_REGISTRY: dict[str, QuantFormat] = {}  # canonical name -> format
_ALIASES: dict[str, str] = {}  # lower-case spelling -> canonical name
_BASE: list[str] = []  # the names that `formats()` lists: all formats except variants
_MIXES: dict[str, str] = {}  # lower-case spelling -> name of a rule for whole models


def register(fmt: QuantFormat, *, variant: bool = False) -> None:
    """Add a format. Variants (other group sizes or scale types) work everywhere, but `formats()` does not list them."""
    for spelling in (fmt.name, *fmt.aliases):
        assert spelling.lower() not in _ALIASES, f"format name {spelling!r} is taken"
        _ALIASES[spelling.lower()] = fmt.name
    _REGISTRY[fmt.name] = fmt
    if not variant:
        _BASE.append(fmt.name)


def register_mix(name: str, *aliases: str) -> None:
    """Reserve the name of a rule that gives the weights of a model different formats (policy/mixes.py, "auto")."""
    for spelling in (name, *aliases):
        assert spelling not in _ALIASES and spelling not in _MIXES, f"format name {spelling!r} is taken"
        _MIXES[spelling] = name


def mix_name(spec: object) -> str | None:
    """Return the canonical name if `spec` names a rule for whole models, else None."""
    return _MIXES.get(spec.lower()) if isinstance(spec, str) else None


def formats(*, variants: bool = False) -> tuple[str, ...]:
    """List the canonical names of all formats, in a fixed order.

    Args:
        variants: also list variants with other group sizes and scale types, such as "afq4g32" and "afq4.f16".

    Returns:
        The names, for `get_format`, `quantize` and `quantize_`.

    Raises:
        Nothing: every value of `variants` is accepted.

    Example:
        for name in isqtorch.formats():
            print(name, isqtorch.get_format(name).bits_per_weight)
    """
    return tuple(_REGISTRY) if variants else tuple(_BASE)


def get_format(name: str | QuantFormat) -> QuantFormat:
    """Look up a format by name.

    Args:
        name: canonical name or alias, in upper or lower case. A QuantFormat is returned as it is.

    Returns:
        The format.

    Raises:
        ValueError: there is no format of this name (the message lists those that exist), or it is a rule for whole
            models, such as "auto".

    Example:
        fmt = isqtorch.get_format("Q4_K")
        print(fmt.name, fmt.formula)  # q4k (d * sc) * q - (dmin * mn)
    """
    if isinstance(name, QuantFormat):
        return name
    canonical = _ALIASES.get(name.lower()) if isinstance(name, str) else None
    if canonical is None and mix_name(name) is not None:
        raise ValueError(
            f"{name!r} is not a format but a rule that gives the layers of a whole model different ones: use it with quantize_, "
            f"IsqConfig or --isq. One weight needs one of {', '.join(formats())}."
        )
    if canonical is None:
        hint = meant(name, [*_ALIASES, *_MIXES]) if isinstance(name, str) else ""
        listed = f"Known formats: {', '.join(formats())} (see isqtorch.formats(variants=True))."
        raise ValueError(f"unknown format {name!r:.200}. {f'{hint} isqtorch.formats() lists all.' if hint else listed}")
    return _REGISTRY[canonical]
