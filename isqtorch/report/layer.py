"""LayerReport: what was done, or would be done, to one weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from isqtorch.formats import get_format
from isqtorch.policy.decide import Decision
from isqtorch.policy.layers import LayerInfo

_SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


@dataclass(frozen=True)
class Outcome:
    """What the rule "feedback" gave for one weight. Errors are those of the outputs on held-out rows, RMS over RMS.

    Attributes:
        share: share of the rows that are packed with feedback; the others by importance alone, because that was better.
        importance: error by importance alone; None if there was nothing to judge with.
        feedback: error with feedback everywhere.
        unjudged: number of matrices that had too few held-out rows to judge with, and were packed by importance alone.
    """

    share: float
    importance: float | None
    feedback: float | None
    unjudged: int = 0

    @property
    def reason(self) -> str:
        """Why the weight, or a part of it, is not packed with feedback; "" if it is."""
        if self.importance is None:
            return "by importance alone: too few held-out rows"
        if not self.share:
            return "by importance alone: feedback is not better on held-out rows"
        if self.share < 1:
            return "a part by importance alone: feedback is not better there on held-out rows"
        return ""


@dataclass
class LayerReport:
    """One weight in a `QuantReport`. Sizes are in bytes, for the weight alone, without a bias.

    Attributes:
        name: module path, followed by the parameter's name if that is not "weight".
        kind: "linear", "embedding", "experts" or "other".
        role: "embedding", "head" (the output head) or "".
        shape: [N, K] for layers, with K input features; [E, N, K] for experts.
        dtype: type of the weight before: bf16, f16, ..., or the name of a format.
        requested: the format asked for, or None.
        stored: the format it has now; None: not quantized.
        reason: why `stored` is not `requested`, and what was lost if the layer is damaged.
        bytes_before, bytes_after: size of the weight; 0 for a layer that shares the weight of another.
        promoted: whether the layer got a larger format because it is an embedding or output head.
        fell_back: whether the requested format does not fit, because its block size does not divide K.
        tied_to: the layer whose weight this one shares, or None.
        error: RMS error relative to the RMS of the original weights, or None if it was not measured. It is always
            measured for damaged layers; for experts it is then the error of the worst one.
        damaged: whether packing lost much more than `QuantFormat.weight_error` leads to expect, in a sample of blocks
            that is taken of every weight. Weights too small for the scales of the format are the common cause.
        feedback: what the rule "feedback" gave; None: it was not asked for, or the weight cannot have it.

    Example:
        layer = isqtorch.quantize_(model, 4, measure_error=True)["model.embed_tokens"]
        print(layer.stored, layer.bytes_after, layer.error)
    """

    name: str
    kind: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    requested: str | None
    stored: str | None
    reason: str
    bytes_before: int
    bytes_after: int
    promoted: bool = False
    fell_back: bool = False
    tied_to: str | None = None
    error: float | None = None
    damaged: bool = False
    feedback: Outcome | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def departs(self) -> bool:
        """Whether the weight is not in the requested format: left as it is, promoted, or in a fallback format."""
        return self.stored != self.requested

    @property
    def bits_per_weight(self) -> float:
        """Average bits per weight, scales included; 0 for a float weight that is stored by another layer."""
        if self.stored is not None:
            return get_format(self.stored).bits_per_weight
        return 8 * self.bytes_after / self.numel if self.numel and self.tied_to is None else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All attributes and `bits_per_weight` in plain types, for JSON."""
        return {**asdict(self), "bits_per_weight": round(self.bits_per_weight, 4)}


def report_layer(layer: LayerInfo, decision: Decision, again: bool = False) -> LayerReport:
    """The report entry of a decision. `again`: the weight is packed anew even if it already has its format."""
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
