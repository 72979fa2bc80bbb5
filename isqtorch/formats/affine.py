"""AFQ, MLX's affine formats: 32, 64 or 128 weights share a 16-bit scale and a 16-bit bias; codes form a bit stream.

MLX stores scales, biases and codes in separate tensors. Here a block holds all three, with the same bit patterns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .base import Fields, QuantFormat, get_format, register
from .bitstream import pack_stream, unpack_stream


@dataclass(frozen=True)
class AffineFormat(QuantFormat):
    """Fields: `scale`, `bias` f16 or bf16 `[n]`; `q` uint8 `[n, group]`."""

    def for_dtype(self, dtype: torch.dtype) -> QuantFormat:
        """Return the variant with f16 scales for f16 weights, else this format."""
        if dtype == torch.float16 and not self.name.endswith(".f16"):
            return get_format(f"{self.name}.f16")
        return self

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def unpack(self, blocks: Tensor) -> Fields:
        fields = self.split(blocks)
        fields["q"] = unpack_stream(fields.pop("qs"), self.bits)
        return fields

    def pack(self, fields: Fields) -> Tensor:
        return self.join({"scale": fields["scale"], "bias": fields["bias"], "qs": pack_stream(fields["q"], self.bits)})

    def fault(self, blocks: Tensor) -> str | None:
        found = super().fault(blocks)
        if found is not None or self.scale_dtype != torch.float16 or self.bits < 3:
            return found
        # The quantizer takes the larger end of the range as bias, so it is about half of all codes or more away from
        # zero. bf16 numbers read as f16 are all near 1, scales and biases alike. Two bits are too few to tell.
        scale, bias = (np.abs(part.numbers(blocks)) for part in self.parts[:2])
        if np.median(scale) > 0.25 and np.median(bias / np.maximum(scale, 1e-7)) < 0.3 * (2**self.bits - 1):
            return "scales and biases are all near 1, as those of bf16 are when they are read as f16"
        return None

    def decode(self, fields: Fields) -> Tensor:
        # 16-bit scale (8 or 11 significant bits) times 8-bit code is exact in f32, so there is one rounding
        return fields["scale"].float()[:, None] * fields["q"].float() + fields["bias"].float()[:, None]


_GROUPS = (64, 32, 128)  # the default first
_PROMOTED = {2: 6, 3: 6, 4: 6, 5: 8, 6: 8, 8: None}
# relative RMS error on N(0, 1) with a margin of 5 %, by bits and group; measured with bf16 scales, f16 is never worse
_WEIGHT_ERROR = {
    2: {32: 0.38, 64: 0.42, 128: 0.45},
    3: {32: 0.18, 64: 0.20, 128: 0.22},
    4: {32: 0.085, 64: 0.096, 128: 0.11},
    5: {32: 0.042, 64: 0.047, 128: 0.051},
    6: {32: 0.021, 64: 0.023, 128: 0.026},
    8: {32: 0.0052, 64: 0.0058, 128: 0.0063},
}


def _register(bits: int, group: int, scale: str) -> None:
    def name(bits: int, group: int) -> str:
        return f"afq{bits}" + (f"g{group}" if group != _GROUPS[0] else "") + (".f16" if scale == "f16" else "")

    promoted = _PROMOTED[bits]
    groups = [f"g{group}"] + [""] * (group == _GROUPS[0])
    scales = [f".{scale}"] + [""] * (scale == "bf16")
    spellings = [f"afq{bits}{g}{s}" for g in groups for s in scales]
    register(
        AffineFormat(
            name=name(bits, group),
            bits=bits,
            block=group,
            layout=f"scale:{scale} bias:{scale} qs:u8[{group * bits // 8}]",
            formula="scale * q + bias",
            source="mlx/backend/cpu/quantized.cpp, quantize()",
            solver="affine",
            fallback=name(bits, 32) if group > 32 else None,
            promoted=name(promoted, group) if promoted else None,
            aliases=tuple(s for s in spellings if s != name(bits, group)),
            weight_error=_WEIGHT_ERROR[bits][group],
            offset="bias",
        ),
        variant=group != _GROUPS[0] or scale != "bf16",
    )


for _scale in ("bf16", "f16"):
    for _group in _GROUPS:
        for _bits in _PROMOTED:
            _register(_bits, _group, _scale)
