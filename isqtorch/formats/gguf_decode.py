"""Decoders for the types in GGUF files that no format of this package has: IQ1, IQ2, IQ3, TQ and NVFP4.

Every function takes blocks, uint8 `[n, block_bytes]`, and returns weights, f32 `[n, block]`, with the roundings of ggml's
`dequantize_row_*`. The first line of each one is its block struct, as in `QuantFormat.layout`.

Most of these types store numbers of entries of a grid: a list of 256 to 2048 vectors of 4 or 8 small numbers, which was
found by search. gguf_grids.bin has the lists (see NOTICE): for every grid in `_GRIDS`, the numbers of its values in
`_GRIDS[name].values`, as a bit stream.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .bitstream import unpack_planes, unpack_stream
from .codebook import E2M1_LEVELS


class _Grid(NamedTuple):
    offset: int  # in the file
    entries: int
    width: int  # numbers in an entry
    values: tuple[int, ...]


_IQ2 = (8, 25, 43)
_GRIDS = {
    "iq2_xxs": _Grid(0, 256, 8, _IQ2),
    "iq2_xs": _Grid(512, 512, 8, _IQ2),
    "iq2_s": _Grid(1536, 1024, 8, _IQ2),
    "iq3_xxs": _Grid(3584, 256, 4, (4, 12, 20, 28, 36, 44, 52, 62)),
    "iq3_s": _Grid(3968, 512, 4, (1, 3, 5, 7, 9, 11, 13, 15)),
    "iq1": _Grid(4736, 2048, 8, (-1, 0, 1)),
}


@cache
def _grid(name: str) -> Tensor:
    """Read a grid: f32 `[entries, width]`."""
    grid = _GRIDS[name]
    bits = 2 if len(grid.values) == 3 else 3
    nbytes = grid.entries * grid.width * bits // 8
    raw = Path(__file__).with_name("gguf_grids.bin").read_bytes()[grid.offset : grid.offset + nbytes]
    codes = unpack_stream(torch.frombuffer(bytearray(raw), dtype=torch.uint8)[None], bits)
    return torch.tensor(grid.values, dtype=torch.float32)[codes.int()].view(grid.entries, grid.width)


# ---- parts of blocks ---------------------------------------------------------------------------------------------------


def _f16(b: Tensor) -> Tensor:
    """`[n, 2]` bytes -> f32 `[n, 1]`."""
    return b.contiguous().view(torch.float16).float()


def _u16(b: Tensor) -> Tensor:
    return b[..., 0::2].int() | b[..., 1::2].int() << 8


def _u32(b: Tensor) -> Tensor:
    return sum((b[..., i::4].long() << (8 * i) for i in range(4)), start=torch.zeros((), dtype=torch.long))


def _nibbles(b: Tensor) -> Tensor:
    """The low nibble of each byte, then the high one: `[n, m]` -> int `[n, 2 m]`."""
    return unpack_stream(b, bits=4).int()


def _signs(bits: Tensor) -> Tensor:
    """Bit i of a byte set -> -1 at place i: int `[...]` -> f32 `[..., 8]`."""
    return 1 - 2 * torch.stack([bits >> i & 1 for i in range(8)], dim=-1).float()


def _signs_of_seven(index: Tensor) -> Tensor:
    """The same for seven stored bits. The eighth makes the number of minuses even."""
    parity = index ^ index >> 4
    parity = parity ^ parity >> 2
    parity = (parity ^ parity >> 1) & 1
    return _signs(index & 127 | parity << 7)


def _by_groups(scale: Tensor, weights: Tensor) -> Tensor:
    """Multiply 256 weights by the scales of equal groups: `[n, g]`, `[n, ...]` -> `[n, 256]`."""
    flat = weights.reshape(len(weights), 256)
    return scale.repeat_interleave(256 // scale.shape[1], dim=1) * flat


# ---- types -------------------------------------------------------------------------------------------------------------


def _iq2_xxs(b: Tensor) -> Tensor:
    """d:f16, then per 32 weights: index:u8[4], and a word with four 7-bit signs and a 4-bit scale."""
    words = b[:, 2:].reshape(-1, 8, 8)
    tail = _u32(words[..., 4:])[..., 0]  # [n, 8]
    scale = _f16(b[:, :2]) * (0.5 + (tail >> 28).float()) * 0.25
    signs = _signs_of_seven(torch.stack([tail >> 7 * i & 127 for i in range(4)], dim=-1))
    return _by_groups(scale, _grid("iq2_xxs")[words[..., :4].long()] * signs)


def _iq2_xs(b: Tensor) -> Tensor:
    """d:f16 qs:u16[32] scales:u8[8]; qs: 9 bits of index, 7 of signs. A scale has 4 bits, for 16 weights."""
    q = _u16(b[:, 2:66])
    scale = _f16(b[:, :2]) * (0.5 + _nibbles(b[:, 66:]).float()) * 0.25
    return _by_groups(scale, _grid("iq2_xs")[(q & 511).long()] * _signs_of_seven(q >> 9))


def _iq2_s(b: Tensor) -> Tensor:
    """d:f16 qs:u8[32] signs:u8[32] qh:u8[8] scales:u8[8]; qh: bits 8-9 of the indices."""
    high = unpack_stream(b[:, 66:74], bits=2).long()
    scale = _f16(b[:, :2]) * (0.5 + _nibbles(b[:, 74:]).float()) * 0.25
    return _by_groups(scale, _grid("iq2_s")[b[:, 2:34].long() | high << 8] * _signs(b[:, 34:66].int()))


def _iq3_xxs(b: Tensor) -> Tensor:
    """d:f16 qs:u8[64], then per 32 weights a word with four 7-bit signs and a 4-bit scale."""
    tail = _u32(b[:, 66:])
    scale = _f16(b[:, :2]) * (0.5 + (tail >> 28).float()) * 0.5
    signs = _signs_of_seven(torch.stack([tail >> 7 * i & 127 for i in range(4)], dim=-1))
    return _by_groups(scale, _grid("iq3_xxs")[b[:, 2:66].long()].reshape(-1, 256) * signs.reshape(-1, 256))


def _iq3_s(b: Tensor) -> Tensor:
    """d:f16 qs:u8[64] qh:u8[8] signs:u8[32] scales:u8[4]; qh: bit 8 of the indices."""
    index = b[:, 2:66].long() | unpack_stream(b[:, 66:74], bits=1).long() << 8
    scale = _f16(b[:, :2]) * (1 + 2 * _nibbles(b[:, 106:])).float()
    return _by_groups(scale, _grid("iq3_s")[index].reshape(-1, 256) * _signs(b[:, 74:106].int()).reshape(-1, 256))


def _iq1_s(b: Tensor) -> Tensor:
    """d:f16 qs:u8[32] qh:u16[8]; per 32 weights qh has bits 8-10 of four indices, a 3-bit scale, the sign of a shift."""
    h = _u16(b[:, 34:])
    high = torch.stack([h >> 3 * i & 7 for i in range(4)], dim=-1).reshape(-1, 32).long()
    scale = _f16(b[:, :2]) * (2 * (h >> 12 & 7) + 1).float()
    shift = torch.where(h >> 15 == 1, -0.125, 0.125).repeat_interleave(4, dim=1)
    return _by_groups(scale, _grid("iq1")[b[:, 2:34].long() | high << 8] + shift[..., None])


def _iq1_m(b: Tensor) -> Tensor:
    """qs:u8[32] qh:u8[16] scales:u16[4]; qh: per 8 weights bits 8-10 of the index and the sign of a shift.

    Four 3-bit scales, each for 16 weights, leave the upper nibble of a word free: the four nibbles are d, an f16.
    """
    words, h = _u16(b[:, 48:]), _nibbles(b[:, 32:48])
    bits = sum((words[:, i] >> 12 << 4 * i for i in range(4)), start=torch.zeros((), dtype=torch.int32))
    d = bits.to(torch.int16).view(torch.float16).float()[:, None]
    scale = d * (2 * torch.stack([words >> 3 * i & 7 for i in range(4)], dim=-1).reshape(-1, 16) + 1).float()
    shift = torch.where(h & 8 == 8, -0.125, 0.125)
    return _by_groups(scale, _grid("iq1")[b[:, :32].long() | (h & 7).long() << 8] + shift[..., None])


def _tq2_0(b: Tensor) -> Tensor:
    """qs:u8[64] d:f16; -1, 0 or 1 in two bits."""
    return _f16(b[:, 64:]) * (unpack_planes(b[:, :64], bits=2, width=32).float() - 1)


def _tq1_0(b: Tensor) -> Tensor:
    """qs:u8[48] qh:u8[4] d:f16; a byte is a fraction of 256 in base 3, with five digits (qh: four), each 0, 1 or 2."""

    def digits(part: Tensor, count: int) -> Tensor:
        wide = part.int()
        return torch.cat([(wide * 3**i & 255) * 3 >> 8 for i in range(count)], dim=1)

    q = torch.cat([digits(b[:, :32], 5), digits(b[:, 32:48], 5), digits(b[:, 48:52], 4)], dim=1)
    return _f16(b[:, 52:]) * (q.float() - 1)


def _nvfp4(b: Tensor) -> Tensor:
    """s:u8[4] qs:u8[32]; scales for 16 weights as unsigned e4m3 numbers, codes as in mxfp4, eight bytes for each scale.

    The scale of the whole tensor, if there is one, is a tensor of its own.
    """
    s = b[:, :4].int()
    exponent, mantissa = s >> 3 & 15, (s & 7).float()
    scale = torch.where(exponent == 0, mantissa * 2.0**-10, torch.ldexp(1 + mantissa / 8, exponent - 8))
    scale = torch.where(s == 127, 0.0, scale)
    q = unpack_planes(b[:, 4:], bits=4, width=8)
    return scale.repeat_interleave(16, dim=1) * torch.tensor(E2M1_LEVELS, dtype=torch.float32)[q.int()]


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "NVFP4": _nvfp4,
}
"""Name of the type -> its decoder."""
