"""ggml's K-quants: super-blocks of 256 weights, cut into sub-blocks of 16 or 32, each with a small integer scale.

A weight w is computed from its code q:

    q2k q4k q5k:  w = (d * sc) * q - (dmin * mn)     sc, mn: unsigned, one per sub-block
    q3k q6k:      w = (d * sc) * (q - zero)          sc: signed (q3k stores sc + 32)
    q8k:          w = d * q
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Fields, QuantFormat, register
from .bitstream import pack_planes, unpack_planes


def _per_element(sub_blocks: Tensor) -> Tensor:
    """Repeat the value of each sub-block for all its elements: `[n, s]` -> `[n, 256]`."""
    return sub_blocks.repeat_interleave(256 // sub_blocks.shape[1], dim=1)


@dataclass(frozen=True)
class _ScaleAndMin(QuantFormat):
    """Base of the formats with two super-scales, `d` for scales and `dmin` for minima.

    Fields: `d`, `dmin` f16 `[n]`; `sc`, `mn` uint8 `[n, s]`; `q` uint8 `[n, 256]`.
    """

    @property
    def offset_times_integers(self) -> bool:
        return True

    def decode(self, fields: Fields) -> Tensor:
        scale = fields["d"].float()[:, None] * fields["sc"].float()  # [n, s]
        offset = fields["dmin"].float()[:, None] * fields["mn"].float()  # [n, s]
        return _per_element(scale) * fields["q"].float() - _per_element(offset)


@dataclass(frozen=True)
class Q2K(_ScaleAndMin):
    """16 sub-blocks of 16; `scales[j]` = sc_j (low nibble) | mn_j (high nibble)."""

    def unpack(self, blocks: Tensor) -> Fields:
        raw = self.split(blocks)
        return {
            "d": raw["d"],
            "dmin": raw["dmin"],
            "sc": raw["scales"] & 15,
            "mn": raw["scales"] >> 4,
            "q": unpack_planes(raw["qs"], bits=2, width=32),
        }

    def pack(self, fields: Fields) -> Tensor:
        return self.join(
            {
                "scales": fields["sc"] | fields["mn"] << 4,
                "qs": pack_planes(fields["q"], bits=2, width=32),
                "d": fields["d"],
                "dmin": fields["dmin"],
            }
        )


@dataclass(frozen=True)
class Q3K(QuantFormat):
    """16 sub-blocks of 16.

    Fields: `d` f16 `[n]`; `sc` uint8 `[n, 16]` = scale + 32; `q` uint8 `[n, 256]` = 0..7 for -4..3.
    A 6-bit `sc_j` is split: low nibbles in `scales[0:8]` (sc_j low, sc_{j+8} high), upper two bits in `scales[8:12]`
    (byte j % 4, bit 2 * (j / 4)). Bit 2 of q lies in `hmask`, bits 0-1 in `qs`.
    """

    def unpack(self, blocks: Tensor) -> Fields:
        raw = self.split(blocks)
        low = unpack_planes(raw["scales"][:, :8], bits=4, width=8)  # [n, 16]
        high = unpack_planes(raw["scales"][:, 8:], bits=2, width=4)  # [n, 16]
        q = unpack_planes(raw["qs"], bits=2, width=32) | unpack_planes(raw["hmask"], bits=1, width=32) << 2
        return {"d": raw["d"], "sc": low | high << 4, "q": q}

    def pack(self, fields: Fields) -> Tensor:
        low = pack_planes(fields["sc"] & 15, bits=4, width=8)  # [n, 8]
        high = pack_planes(fields["sc"] >> 4, bits=2, width=4)  # [n, 4]
        return self.join(
            {
                "hmask": pack_planes(fields["q"] >> 2, bits=1, width=32),
                "qs": pack_planes(fields["q"] & 3, bits=2, width=32),
                "scales": torch.cat([low, high], dim=1),
                "d": fields["d"],
            }
        )

    def decode(self, fields: Fields) -> Tensor:
        scale = fields["d"].float()[:, None] * (fields["sc"].float() - 32)  # [n, 16]
        return _per_element(scale) * (fields["q"].float() - 4)


@dataclass(frozen=True)
class Q45K(_ScaleAndMin):
    """8 sub-blocks of 32, with 6-bit `sc` and `mn`; q5k has bit 4 of q in `qh`.

    The twelve bytes of `scales`, for j < 4:

        byte j     = sc_j (6 bits) | upper two bits of sc_{j+4}
        byte j + 4 = mn_j (6 bits) | upper two bits of mn_{j+4}
        byte j + 8 = low nibble of sc_{j+4} | low nibble of mn_{j+4}
    """

    def unpack(self, blocks: Tensor) -> Fields:
        fields = self.split(blocks)
        scales = fields.pop("scales")
        first, second, third = scales[:, :4], scales[:, 4:8], scales[:, 8:]
        fields["sc"] = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
        fields["mn"] = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
        fields["q"] = unpack_planes(fields.pop("qs"), bits=4, width=32)
        if "qh" in fields:
            fields["q"] = fields["q"] | unpack_planes(fields.pop("qh"), bits=1, width=32) << 4
        return fields

    def pack(self, fields: Fields) -> Tensor:
        sc_low, sc_high = fields["sc"][:, :4], fields["sc"][:, 4:]
        mn_low, mn_high = fields["mn"][:, :4], fields["mn"][:, 4:]
        first = sc_low | sc_high >> 4 << 6
        second = mn_low | mn_high >> 4 << 6
        third = sc_high & 15 | mn_high << 4
        raw = {
            "d": fields["d"],
            "dmin": fields["dmin"],
            "scales": torch.cat([first, second, third], dim=1),
            "qs": pack_planes(fields["q"] & 15, bits=4, width=32),
        }
        if self.bits == 5:
            raw["qh"] = pack_planes(fields["q"] >> 4, bits=1, width=32)
        return self.join(raw)


@dataclass(frozen=True)
class Q6K(QuantFormat):
    """16 sub-blocks of 16. Fields: `d` f16 `[n]`; `sc` int8 `[n, 16]`; `q` uint8 `[n, 256]` = 0..63 for -32..31."""

    def unpack(self, blocks: Tensor) -> Fields:
        raw = self.split(blocks)
        q = unpack_planes(raw["ql"], bits=4, width=64) | unpack_planes(raw["qh"], bits=2, width=32) << 4
        return {"d": raw["d"], "sc": raw["scales"], "q": q}

    def pack(self, fields: Fields) -> Tensor:
        return self.join(
            {
                "ql": pack_planes(fields["q"] & 15, bits=4, width=64),
                "qh": pack_planes(fields["q"] >> 4, bits=2, width=32),
                "scales": fields["sc"],
                "d": fields["d"],
            }
        )

    def decode(self, fields: Fields) -> Tensor:
        scale = fields["d"].float()[:, None] * fields["sc"].float()  # [n, 16]; both products are rounded, as in ggml
        return _per_element(scale) * (fields["q"].float() - 32)


@dataclass(frozen=True)
class Q8K(QuantFormat):
    """Fields: `d` f32 `[n]`; `q` int8 `[n, 256]`; `bsums` int16 `[n, 16]`, sums of 16 codes for dot products."""

    def unpack(self, blocks: Tensor) -> Fields:
        raw = self.split(blocks)
        return {"d": raw["d"], "q": raw["qs"], "bsums": raw["bsums"]}

    def pack(self, fields: Fields) -> Tensor:
        return self.join({"d": fields["d"], "qs": fields["q"], "bsums": fields["bsums"]})

    @property
    def codes(self) -> Sequence[int]:
        return range(-127, 128)

    def with_codes(self, fields: Fields, q: Tensor) -> Fields:
        return {**fields, "q": q, "bsums": q.view(-1, 16, 16).sum(dim=2).to(torch.int16)}

    def decode(self, fields: Fields) -> Tensor:
        return fields["d"][:, None] * fields["q"].float()


_SOURCE = "ggml-common.h and ggml-quants.c, quantize_row_q*_K_ref and _impl"

register(
    Q2K(
        name="q2k",
        bits=2,
        block=256,
        layout="scales:u8[16] qs:u8[64] d:f16 dmin:f16",
        formula="(d * sc) * q - (dmin * mn)",
        source=_SOURCE,
        solver="kquants",
        takes_importance=True,
        fallback="q4_0",
        promoted="q6k",
        aliases=("q2_k",),
        weight_error=0.32,
        never_negative=("d", "dmin"),
        offset="dmin",
    )
)
register(
    Q3K(
        name="q3k",
        bits=3,
        block=256,
        layout="hmask:u8[32] qs:u8[64] scales:u8[12] d:f16",
        formula="(d * (sc - 32)) * (q - 4)",
        source=_SOURCE,
        solver="kquants",
        takes_importance=True,
        fallback="q4_0",
        promoted="q6k",
        aliases=("q3_k",),
        weight_error=0.16,
    )
)
register(
    Q45K(
        name="q4k",
        bits=4,
        block=256,
        layout="d:f16 dmin:f16 scales:u8[12] qs:u8[128]",
        formula="(d * sc) * q - (dmin * mn)",
        source=_SOURCE,
        solver="kquants",
        takes_importance=True,
        fallback="q5_0",
        promoted="q6k",
        aliases=("q4_k",),
        weight_error=0.075,
        never_negative=("d", "dmin"),
        offset="dmin",
    )
)
register(
    Q45K(
        name="q5k",
        bits=5,
        block=256,
        layout="d:f16 dmin:f16 scales:u8[12] qh:u8[32] qs:u8[128]",
        formula="(d * sc) * q - (dmin * mn)",
        source=_SOURCE,
        solver="kquants",
        takes_importance=True,
        fallback="q5_1",
        promoted="q8_0",
        aliases=("q5_k",),
        weight_error=0.038,
        never_negative=("d", "dmin"),
        offset="dmin",
    )
)
register(
    Q6K(
        name="q6k",
        bits=6,
        block=256,
        layout="ql:u8[128] qh:u8[64] scales:i8[16] d:f16",
        formula="(d * sc) * (q - 32)",
        source=_SOURCE,
        solver="kquants",
        takes_importance=True,
        fallback="q8_0",
        promoted="q8_0",
        aliases=("q6_k",),
        weight_error=0.019,
    )
)
register(
    Q8K(
        name="q8k",
        bits=8,
        block=256,
        layout="d:f32 qs:i8[256] bsums:i16[16]",
        formula="d * q",
        source=_SOURCE,
        solver="absmax",
        fallback="q8_1",
        promoted="q8_0",
        aliases=("q8_k",),
        weight_error=0.0073,
    )
)
