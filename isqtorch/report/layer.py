"""LayerReport: what happened, or would happen, to one weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from isqtorch.formats import get_format
from isqtorch.policy.decide import Decision
from isqtorch.policy.layers import LayerInfo

_SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


@dataclass
class LayerReport:
    """One weight. Sizes are those of the weight alone, without a bias."""

    name: str
    kind: str  # linear, embedding, experts or other
    role: str  # "", embedding or head
    shape: tuple[int, ...]  # [N, K] for layers, [E, N, K] for experts
    dtype: str  # what it was: bf16, f16, ..., or a format
    requested: str | None  # the format that was asked for; None: none was
    stored: str | None  # the format it has now; None: left as it was
    reason: str  # why `stored` is not `requested`
    bytes_before: int
    bytes_after: int
    promoted: bool = False
    fell_back: bool = False
    tied_to: str | None = None  # the layer whose weight this one shares; its bytes count there
    error: float | None = None  # relative RMS error against the weight it was made from

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def departs(self) -> bool:
        """Whether the weight is not in the format that was asked for it: left, promoted, or in another one."""
        return self.stored != self.requested

    @property
    def bits_per_weight(self) -> float:
        if self.stored is not None:
            return get_format(self.stored).bits_per_weight
        return 8 * self.bytes_after / self.numel if self.numel and self.tied_to is None else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bits_per_weight": round(self.bits_per_weight, 4)}


def report_layer(layer: LayerInfo, decision: Decision, again: bool = False) -> LayerReport:
    """The entry of a weight about which was decided; `again`: it is packed anew even if it has its format already."""
    stored = decision.format.name if decision.format is not None else layer.packed_as
    after = layer.nbytes
    if decision.format is not None and layer.tied_to is None:
        after = layer.packed_bytes(decision.format)
    reason = decision.reason
    if layer.packed_as is not None and stored == layer.packed_as:
        now = f"stays {stored}" if decision.format is None else "made anew" if again else f"is {stored} already"
        reason = f"{reason}; {now}" if reason else now
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        role=layer.role,
        shape=layer.shape,
        dtype=layer.packed_as or _SHORT.get(layer.dtype, str(layer.dtype).removeprefix("torch.")),
        requested=decision.requested,
        stored=stored,
        reason=reason,
        bytes_before=layer.nbytes,
        bytes_after=after,
        promoted=decision.promoted,
        fell_back=decision.fell_back,
        tied_to=layer.tied_to,
    )
