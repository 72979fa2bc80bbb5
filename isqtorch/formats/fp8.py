"""FP8: 128 floating-point codes of type e4m3fn under one f32 scale.

The bits of a code:

    sign | exponent (4 bits, bias 7) | mantissa (3 bits)      largest 448 = 0x7E, NaN = 0x7F, no infinities
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .base import Fields, QuantFormat, register

E4M3_MAX = 448.0


@cache
def e4m3_table() -> Tensor:
    """Return the exact values of all 256 codes, f32 `[256]`."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        magnitude = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        if code & 127 == 127:
            magnitude = float("nan")
        values.append(-magnitude if code & 128 else magnitude)
    return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True)
class Fp8Format(QuantFormat):
    """Fields: `scale` f32 `[n]`; `q` uint8 `[n, 128]`, e4m3fn bit patterns."""

    def unpack(self, blocks: Tensor) -> Fields:
        raw = self.split(blocks)
        return {"scale": raw["scale"], "q": raw["qs"]}

    def pack(self, fields: Fields) -> Tensor:
        return self.join({"scale": fields["scale"], "qs": fields["q"]})

    @property
    def codes(self) -> Sequence[int]:
        return (*range(0xFE, 0x80, -1), *range(0x7F))  # all but NaN and the negative zero

    def decode(self, fields: Fields) -> Tensor:
        codes = fields["q"]
        return e4m3_table().to(codes.device)[codes.int()] * fields["scale"][:, None]

    def fault(self, blocks: Tensor) -> str | None:
        codes = blocks.numpy()[:, self.parts[1].offset :]
        bad = int(np.count_nonzero(codes & 127 == 127))
        return f"{bad} of {codes.size} sampled codes are NaN" if bad else super().fault(blocks)


register(
    Fp8Format(
        name="fp8",
        bits=8,
        block=128,
        layout="scale:f32 qs:u8[128]",
        formula="e4m3(q) * scale",
        source="OCP 8-bit floating point specification (E4M3); scale = amax / 448",
        solver="fp8",
        activations="fp8",
        fallback="q8_0",
        aliases=("fp8_e4m3", "fp8_e4m3fn"),
        weight_error=0.027,
        never_negative=("scale",),
    )
)
