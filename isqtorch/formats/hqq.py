"""HQQ (half-quadratic quantization): like AFQ, but with a zero point, which is stored in units of the scale.

Groups run along K, which the hqq package calls axis 1. Codes form the same bit stream as in AFQ.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Fields, QuantFormat, register
from .bitstream import pack_stream, unpack_stream


@dataclass(frozen=True)
class HqqFormat(QuantFormat):
    """Fields: `scale`, `zero` f16 `[n]`; `q` uint8 `[n, group]`."""

    def unpack(self, blocks: Tensor) -> Fields:
        fields = self.split(blocks)
        fields["q"] = unpack_stream(fields.pop("qs"), self.bits)
        return fields

    def pack(self, fields: Fields) -> Tensor:
        return self.join({"scale": fields["scale"], "zero": fields["zero"], "qs": pack_stream(fields["q"], self.bits)})

    @property
    def offset_in_steps(self) -> bool:
        return True

    def decode(self, fields: Fields) -> Tensor:
        return (fields["q"].float() - fields["zero"].float()[:, None]) * fields["scale"].float()[:, None]


_GROUPS = (64, 32, 128)  # the default first
_WEIGHT_ERROR = {4: {32: 0.079, 64: 0.091, 128: 0.11}, 8: {32: 0.0046, 64: 0.0053, 128: 0.006}}

for _group in _GROUPS:
    for _bits in (4, 8):
        _default = _group == _GROUPS[0]
        register(
            HqqFormat(
                name=f"hqq{_bits}" if _default else f"hqq{_bits}g{_group}",
                bits=_bits,
                block=_group,
                layout=f"scale:f16 zero:f16 qs:u8[{_group * _bits // 8}]",
                formula="(q - zero) * scale",
                source="mobiusml/hqq, core/optimize.py, optimize_weights_proximal_legacy()",
                solver="hqq",
                fallback=f"hqq{_bits}g32" if _group > 32 else None,
                promoted=("hqq8" if _default else f"hqq8g{_group}") if _bits == 4 else None,
                aliases=(f"hqq{_bits}g{_group}",) if _default else (),
                weight_error=_WEIGHT_ERROR[_bits][_group],
                never_negative=("scale",),
                offset="zero",
            ),
            variant=not _default,
        )
