"""ggml's formats with 32 weights in a block: one scale per block, for q4_1 and q5_1 also a minimum.

Positions of the codes:

    q4_0, q4_1: qs[l] = code l (low nibble) | code l + 16 (high nibble)
    q5_0, q5_1: the same, and bit e of the little-endian word qh is bit 4 of code e
    q8_0, q8_1: one signed byte per code
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Fields, QuantFormat, register
from .bitstream import pack_planes, pack_stream, unpack_planes, unpack_stream


@dataclass(frozen=True)
class GgmlFormat(QuantFormat):
    """Fields: `d` f16 `[n]`, `m` or `s` f16 `[n]` where the layout has it, `q` uint8 (8 bits: int8) `[n, 32]`."""

    zero_point: int = 0  # the code that means 0, in formats without a minimum `m`

    def unpack(self, blocks: Tensor) -> Fields:
        fields = self.split(blocks)
        q = fields.pop("qs")
        if self.bits < 8:
            q = unpack_planes(q, bits=4, width=16)
        if "qh" in fields:
            q = q | unpack_stream(fields.pop("qh"), bits=1) << 4
        return fields | {"q": q}

    def pack(self, fields: Fields) -> Tensor:
        raw = dict(fields)
        q = raw.pop("q")
        if self.bits == 5:
            raw["qh"] = pack_stream(q >> 4, bits=1)
        raw["qs"] = q if self.bits == 8 else pack_planes(q & 15, bits=4, width=16)
        return self.join(raw)

    @property
    def codes(self) -> Sequence[int]:
        return range(-127, 128) if self.bits == 8 else super().codes

    def with_codes(self, fields: Fields, q: Tensor) -> Fields:
        found = super().with_codes(fields, q)
        if "s" in fields:  # only where codes changed: the quantizer multiplies by a scale that is not rounded yet
            total = (fields["d"].float() * q.sum(dim=1).float()).half()
            found["s"] = torch.where((q == fields["q"]).all(dim=1), fields["s"], total)
        return found

    def decode(self, fields: Fields) -> Tensor:
        w = (fields["q"].float() - self.zero_point) * fields["d"].float()[:, None]  # [n, 32]
        return w + fields["m"].float()[:, None] if "m" in fields else w


_SOURCE = "ggml-common.h and ggml-quants.c, quantize_row_*_ref and quantize_*_impl"

register(
    GgmlFormat(
        name="q4_0",
        bits=4,
        block=32,
        layout="d:f16 qs:u8[16]",
        formula="(q - 8) * d",
        source=_SOURCE,
        solver="absmax",
        takes_importance=True,
        promoted="q6k",
        weight_error=0.09,
        zero_point=8,
    )
)
register(
    GgmlFormat(
        name="q4_1",
        bits=4,
        block=32,
        layout="d:f16 m:f16 qs:u8[16]",
        formula="q * d + m",
        source=_SOURCE,
        solver="minmax",
        takes_importance=True,
        promoted="q6k",
        weight_error=0.082,
        never_negative=("d",),
        offset="m",
    )
)
register(
    GgmlFormat(
        name="q5_0",
        bits=5,
        block=32,
        layout="d:f16 qh:u8[4] qs:u8[16]",
        formula="(q - 16) * d",
        source=_SOURCE,
        solver="absmax",
        takes_importance=True,
        promoted="q8_0",
        weight_error=0.045,
        zero_point=16,
    )
)
register(
    GgmlFormat(
        name="q5_1",
        bits=5,
        block=32,
        layout="d:f16 m:f16 qh:u8[4] qs:u8[16]",
        formula="q * d + m",
        source=_SOURCE,
        solver="minmax",
        takes_importance=True,
        promoted="q8_0",
        weight_error=0.04,
        never_negative=("d",),
        offset="m",
    )
)
register(
    GgmlFormat(
        name="q8_0",
        bits=8,
        block=32,
        layout="d:f16 qs:i8[32]",
        formula="q * d",
        source=_SOURCE,
        solver="absmax",
        weight_error=0.0056,
        never_negative=("d",),
    )
)
register(
    GgmlFormat(
        name="q8_1",
        bits=8,
        block=32,
        layout="d:f16 s:f16 qs:i8[32]",
        formula="q * d  (s = d * sum of q, for dot products)",
        source=_SOURCE,
        solver="absmax",
        promoted="q8_0",
        weight_error=0.0056,
        never_negative=("d",),
    )
)
