"""Formats whose 4-bit codes are numbers of entries in a fixed table of 16 integers: ggml's iq4_nl and iq4_xs, and mxfp4.

Positions of the codes, in every run of 16 bytes (32 weights):

    qs[l] = code l (low nibble) | code l + 16 (high nibble)

The entries of iq4 lie closer together near zero, where most weights are. Those of mxfp4 are the values of a 4-bit
floating-point number (E2M1: sign, 2 bits of exponent, 1 of mantissa) times two, so that all of them are integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Fields, QuantFormat, get_format, register
from .bitstream import pack_planes, pack_stream, unpack_planes, unpack_stream

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


_PROMOTED = get_format("q4_0").promoted  # as the other formats of four bits


@dataclass(frozen=True)
class CodebookFormat(QuantFormat):
    """Fields: the parts of the layout that hold scales, and `q` uint8 `[n, block]`, numbers of entries of `levels`."""

    levels: tuple[int, ...] = ()

    def unpack(self, blocks: Tensor) -> Fields:
        fields = self.split(blocks)
        return fields | {"q": unpack_planes(fields.pop("qs"), bits=4, width=16)}

    def pack(self, fields: Fields) -> Tensor:
        raw = dict(fields)
        return self.join(raw | {"qs": pack_planes(raw.pop("q"), bits=4, width=16)})

    def entries(self, codes: Tensor) -> Tensor:
        """Look up codes: uint8, any shape -> f32, same shape."""
        return torch.tensor(self.levels, dtype=torch.float32, device=codes.device)[codes.int()]

    def decode(self, fields: Fields) -> Tensor:
        return fields["d"].float()[:, None] * self.entries(fields["q"])


@dataclass(frozen=True)
class Iq4Xs(CodebookFormat):
    """8 sub-blocks of 32. Fields: `d` f16 `[n]`; `sc` int8 `[n, 8]` = -32..31; `q` uint8 `[n, 256]`.

    The low four bits of sc + 32 are a nibble of `scales_l`, the high two are two bits of `scales_h`, each in order.
    """

    def unpack(self, blocks: Tensor) -> Fields:
        fields = super().unpack(blocks)
        low, high = unpack_stream(fields.pop("scales_l"), bits=4), unpack_stream(fields.pop("scales_h"), bits=2)
        return fields | {"sc": (low | high << 4).to(torch.int8) - 32}

    def pack(self, fields: Fields) -> Tensor:
        raw = dict(fields)
        scales = (raw.pop("sc") + 32).to(torch.uint8)
        return super().pack(
            raw | {"scales_h": pack_stream(scales >> 4, bits=2), "scales_l": pack_stream(scales & 15, bits=4)}
        )

    def decode(self, fields: Fields) -> Tensor:
        scale = fields["d"].float()[:, None] * fields["sc"].float()  # [n, 8]
        return scale.repeat_interleave(32, dim=1) * self.entries(fields["q"])


@dataclass(frozen=True)
class Mxfp4(CodebookFormat):
    """Fields: `e` uint8 `[n]`; `q` uint8 `[n, 32]`."""

    @property
    def codes(self) -> Sequence[int]:
        return (*range(15, 8, -1), *range(8))  # all but the negative zero

    def decode(self, fields: Fields) -> Tensor:
        return power_of_two(fields["e"])[:, None] * self.entries(fields["q"])


def power_of_two(e: Tensor) -> Tensor:
    """Return 2**(e - 128) for uint8 e, as f32 of the same shape. For 255, which means NaN, it is 2**127, as in ggml.

    The two smallest are subnormal numbers, so the bits are put together here instead of by `ldexp`.
    """
    wide = e.int()
    return torch.where(wide < 2, 0x00200000 << wide.clamp(max=1), (wide - 1) << 23).view(torch.float32)


def mxfp4_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """Convert MXFP4 as checkpoints store it (gpt-oss, MLX) to rows of the format mxfp4. Exact.

    Checkpoints keep neighbouring weights in one byte, the first in the low nibble, and scales in a tensor of their own.

    Args:
        codes: uint8 `[..., K / 2]`, or `[..., K / 32, 16]`. Byte j holds weights 2j and 2j + 1.
        scales: uint8 `[..., K / 32]`: s means 2**(s - 127) times the value of a code.

    Returns:
        uint8 `[..., K / 32 * 17]`, on the device of the arguments.

    Raises:
        ValueError: the tensors are not uint8, or their shapes do not belong together.

    Example:
        packed = mxfp4_blocks(torch.zeros(8, 32, dtype=torch.uint8), torch.full((8, 2), 127, dtype=torch.uint8))
        print(packed.shape)  # torch.Size([8, 34])
    """
    flat = codes.flatten(-2) if codes.dim() == scales.dim() + 1 and codes.dim() > 1 else codes
    fits = flat.dim() == scales.dim() > 0 and flat.shape == (*scales.shape[:-1], 16 * scales.shape[-1])
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8 or not fits:
        raise ValueError(
            f"mxfp4_blocks: expected uint8 codes [..., K / 2] or [..., K / 32, 16] and uint8 scales [..., K / 32], got "
            f"{codes.dtype} {list(codes.shape)} and {scales.dtype} {list(scales.shape)}."
        )
    first, second = flat.reshape(scales.numel(), 2, 8).unbind(1)  # 16 weights each
    qs = torch.stack([first & 15 | second << 4, first >> 4 | second & 0xF0], dim=-1)  # weights 2j and 2j + 1 of both
    return torch.cat([scales.reshape(-1, 1), qs.flatten(1)], dim=1).view(*scales.shape[:-1], 17 * scales.shape[-1])


def mxfp4_codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `mxfp4_blocks`: convert rows of the format mxfp4 to codes and scales as checkpoints store them. Exact.

    Args:
        blocks: uint8 `[..., K / 32 * 17]`.

    Returns:
        codes uint8 `[..., K / 2]` and scales uint8 `[..., K / 32]`.

    Raises:
        ValueError: `blocks` is not uint8, or its rows do not consist of whole blocks.

    Example:
        codes, scales = mxfp4_codes(torch.zeros(8, 34, dtype=torch.uint8))
        print(codes.shape, scales.shape)  # torch.Size([8, 32]) torch.Size([8, 2])
    """
    if blocks.dtype != torch.uint8 or blocks.dim() == 0 or blocks.shape[-1] % 17:
        raise ValueError(
            f"mxfp4_codes: expected uint8 rows whose size is a multiple of 17 bytes, got {blocks.dtype} {list(blocks.shape)}."
        )
    lead, count = blocks.shape[:-1], blocks.shape[-1] // 17
    each = blocks.reshape(blocks.numel() // 17, 17)
    even, odd = each[:, 1::2], each[:, 2::2]
    codes = torch.cat([even & 15 | odd << 4, even >> 4 | odd & 0xF0], dim=1)
    return codes.view(*lead, 16 * count), each[:, 0].reshape(*lead, count)


_SOURCE = "ggml-common.h and ggml-quants.c, quantize_row_iq4_nl_impl"

register(
    CodebookFormat(
        name="iq4_nl",
        bits=4,
        block=32,
        layout="d:f16 qs:u8[16]",
        formula="d * NL[q]",
        source=_SOURCE,
        solver="codebook",
        takes_importance=True,
        promoted=_PROMOTED,
        aliases=("iq4nl",),
        weight_error=0.08,
        levels=IQ4_LEVELS,
    )
)
register(
    Iq4Xs(
        name="iq4_xs",
        bits=4,
        block=256,
        layout="d:f16 scales_h:u8[2] scales_l:u8[4] qs:u8[128]",
        formula="(d * sc) * NL[q]",
        source=_SOURCE,
        solver="codebook",
        takes_importance=True,
        fallback="iq4_nl",
        promoted=_PROMOTED,
        aliases=("iq4xs",),
        weight_error=0.081,
        levels=IQ4_LEVELS,
    )
)
register(
    Mxfp4(
        name="mxfp4",
        bits=4,
        block=32,
        layout="e:e8m0 qs:u8[16]",
        formula="2**(e - 128) * K[q]",
        source="OCP microscaling formats (MXFP4); ggml-quants.c, quantize_row_mxfp4_ref",
        solver="codebook",
        promoted=_PROMOTED,
        weight_error=0.12,
        levels=E2M1_LEVELS,
    )
)
