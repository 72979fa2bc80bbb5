"""Policy: which layer gets which format, and why.

The input is a list of layer descriptions, so a live model (`inventory.py`) and the headers of a checkpoint
(`headers.py`) go through the same rules, in this order:

    1. layers that are never quantized, exclude patterns, and topology entries that leave a layer as it is
    2. include patterns and organization
    3. the format: that of the topology entry, else the default; a number of bits keeps what is stored in so many
    4. promotion of embeddings and output heads
    5. the scale type that suits the dtype of the weight
    6. fallback to a format whose block size divides K

A rule for whole models ("q4k_m", "auto") replaces both the default format and the promotion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from isqtorch.formats import AUTO, KEEP, QuantFormat, Spec, get_format, mix_name, number_of_bits, resolve_format
from isqtorch.modules.packed import FLOAT_DTYPES

from .layers import LayerInfo
from .mixes import assign
from .numbers import departure, is_met, promotion, share_of_tables
from .request import Assigned, Request
from .topology import Entry

_POSITIONS = re.compile(
    r"(?:^|_)(?:pos|positions?|positional|token_type|segment)(?:_|$)|^(?:wpe|wtte)$|^relative_attention_bias$|^distance_embedding$"
)
_UNMATCHED_NOTES = 10
_CLASSIFIERS = {"score", "classifier", "classification_head", "qa_outputs"}
_ROUTER_LAST = ("gate", "wg", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Decision:
    """What happens to one weight."""

    name: str
    requested: str | None  # canonical name of the format asked for this layer; None: no format
    format: QuantFormat | None  # None: left as it is
    reason: str = ""  # why `format` is not `requested`
    promoted: bool = False
    fell_back: bool = False
    firm: bool = False  # decided by a rule for this layer, not by a default; overrides the decisions of tied layers
    device: torch.device | None = None  # where a topology entry puts the layer
    by_number: bool = False  # a number of bits was asked for, so the best rule of the format is meant, too


@dataclass(frozen=True)
class Verdict:
    """The decisions, one per layer in the same order, and notes for the user."""

    decisions: list[Decision]
    notes: list[str]


def decide(layers: Sequence[LayerInfo], request: Request) -> Verdict:
    """Apply all rules.

    Raises:
        ValueError: a shape does not fit and `fallback="error"`; "moqe" without routed experts; the topology gives two
            formats to layers that share one weight.
    """
    if request.options.organization == "moqe" and not any(_is_expert(layer) and not layer.keep for layer in layers):
        raise ValueError(
            f"{request.op}: organization='moqe' quantizes routed experts only, and this model has no fused experts that can be "
            "quantized, nor a linear layer with a component 'experts' in its path. Use organization='default'."
        )
    siblings = {layer.name for layer in layers}
    assigned = _assigned(layers, request)
    share = share_of_tables(layers)
    decisions = [_decide_one(layer, request, siblings, assigned, share) for layer in layers]
    decisions = _keep_experts_together(layers, decisions)
    if request.options.fallback == "error":
        bad = [d for d in decisions if d.fell_back]
        if bad:
            listed = "; ".join(f"{d.name}: {d.reason}" for d in bad[:5]) + (" ..." if len(bad) > 5 else "")
            raise ValueError(
                f"{request.op}: {len(bad)} layers do not fit as asked: {listed}. Set fallback='up' to allow this."
            )
    return Verdict(_agree_on_ties(layers, decisions, request.op), _unmatched(layers, request))


# ---- one layer -------------------------------------------------------------------------------------------------------


def _assigned(layers: Sequence[LayerInfo], request: Request) -> Mapping[str, Assigned] | None:
    """The format that a rule for whole models gives each layer; None if the request names a single format."""
    mix = mix_name(request.fmt)
    if mix not in (AUTO, KEEP):
        return None if mix is None else assign(mix, layers)
    if request.assigned is None and mix == KEEP:
        raise ValueError(
            f"{request.op}: 'keep' takes over what a checkpoint has quantized already, which {request.op} does not do. Load such a "
            "checkpoint with quantization_config=isqtorch.IsqConfig('keep')."
        )
    if request.assigned is None:
        raise ValueError(
            f"{request.op}: 'auto' chooses formats by measuring weights, which {request.op} does not do. Use quantize_ (or `isqtorch "
            "quantize --isq auto`), save report.topology(), and give that as topology."
        )
    return request.assigned


def _decide_one(
    layer: LayerInfo, request: Request, siblings: set[str], assigned: Mapping[str, Assigned] | None, share: float
) -> Decision:
    entry = request.topology.find(layer.name)
    pinned = entry is not None and (entry.spec is not None or entry.leave)
    spec: Spec | None = entry.spec if entry is not None and pinned else request.fmt
    given = None if assigned is None or pinned else assigned.get(layer.name)
    if assigned is not None and not pinned:
        spec = None if given is None else given.format
    device = entry.device if entry is not None and entry.device is not None else layer.device_type
    bits = number_of_bits(spec)
    requested = None if spec is None else resolve_format(spec, device, layer.shape[-1])
    decision = Decision(
        layer.name,
        requested.name if requested else None,
        None,
        device=entry.device if entry else None,
        by_number=bits is not None,
    )
    never = _reason_never(layer, request, entry, siblings)
    if never is not None:
        return replace(decision, reason=never, firm=True)
    not_asked = _reason_not_asked(layer, request, spec)
    if not_asked is not None:
        return replace(decision, reason=not_asked)
    assert spec is not None and requested is not None, f"{layer.name}: no format and no reason"
    kept = None if pinned else _kept_as(layer, spec)
    if kept is not None:
        return replace(decision, requested=kept.name, format=kept, reason=f"kept: stored as {kept.name}")

    wanted, reasons = requested, [given.why] if given is not None and given.why else []
    promoted = False
    firm = entry is not None and entry.spec is not None
    if layer.role and not firm and given is None:
        if bits is not None:
            wanted = promotion(requested, device, layer.shape[-1], share)
        elif requested.promoted is not None:
            wanted = get_format(requested.promoted)
        promoted = wanted.name != requested.name
    if promoted:
        reasons.append(
            f"{'output head' if layer.role == 'head' else 'embedding'}: promoted from {requested.name} to {wanted.name}"
        )
    elif bits is not None and (departs := departure(bits, requested, device, layer.shape[-1])):
        reasons.append(departs)
    if not (isinstance(spec, str) and "." in spec):  # "afq4.f16": the user chose the scale type
        suited = wanted.for_dtype(layer.dtype)
        if suited.name != wanted.name:
            reasons.append(f"{suited.name}: its scales have the weights' type")
        wanted = suited
    fmt, misfit = _fit(wanted, layer.shape[-1], request.options.fallback)
    if misfit:
        reasons.append(misfit)
    elif bits is not None and not promoted and not is_met(bits, requested, device):
        fmt, misfit = (None if request.options.fallback == "skip" else fmt), "the smallest that fits"
        reasons.append(f"{misfit}: left as it is" if fmt is None else misfit)
    return replace(
        decision, format=fmt, reason="; ".join(reasons), promoted=promoted, fell_back=bool(misfit), firm=firm or not fmt
    )


def _kept_as(layer: LayerInfo, spec: Spec) -> QuantFormat | None:
    """The format that holds exactly what the checkpoint has, if a number of bits is asked for, and it has so many.

    No other format of this size is better: it would add its own error to that of the checkpoint.
    """
    bits = number_of_bits(spec)
    return next((fmt for fmt in map(get_format, layer.stored_as) if fmt.bits == bits), None)


def _reason_never(layer: LayerInfo, request: Request, entry: Entry | None, siblings: set[str]) -> str | None:
    """Reason why this layer must stay as it is, or None."""
    never = _unsuited(layer, siblings)
    if never is not None:
        return never
    for pattern in request.excluded:
        if pattern.regex.search(layer.name):
            return pattern.reason
    if entry is not None and entry.leave:
        return f"topology entry {entry.key!r} leaves it"
    return None


def _reason_not_asked(layer: LayerInfo, request: Request, spec: Spec | None) -> str | None:
    """Reason why no option selects this layer, or None."""
    if request.included is not None and not any(pattern.regex.search(layer.name) for pattern in request.included):
        return "no include pattern matches"
    if request.options.organization == "moqe" and not _is_expert(layer):
        return "organization moqe: not a routed expert"
    if spec is None and mix_name(request.fmt) == KEEP:
        return "the checkpoint has it in floats"
    if spec is None:
        return "not in the topology, and there is no default format"
    return None


def _unsuited(layer: LayerInfo, siblings: set[str]) -> str | None:
    """Reason why this layer can never be quantized, whatever the options, or None."""
    if layer.keep is not None or layer.kind == "other":
        return layer.keep or "not a linear layer or embedding"
    if layer.dtype not in FLOAT_DTYPES:
        return f"its weight is {str(layer.dtype).removeprefix('torch.')}; only float32, float16 and bfloat16 can be quantized"
    if layer.numel == 0:
        return "its weight is empty"
    parts = layer.name.split(".")
    if layer.kind == "embedding" and _POSITIONS.search(parts[-1]):
        return "position and token type embeddings are small and sensitive, never quantized"
    if layer.kind == "linear" and _is_router(layer, parts, siblings):
        return "routers are small and sensitive, never quantized"
    if layer.kind == "linear" and _CLASSIFIERS & set(parts) and _is_narrow(layer):
        return "the outputs of classifiers are small and sensitive, never quantized"
    return None


def _is_narrow(layer: LayerInfo) -> bool:
    """Whether a linear layer has so few outputs that packing it saves nothing."""
    rows, columns = layer.shape
    return rows <= 512 and 8 * rows <= columns


def _is_router(layer: LayerInfo, parts: list[str], siblings: set[str]) -> bool:
    """Whether a layer chooses experts. The name "gate" is not enough: many gated MLPs use it for a full projection."""
    if "router" in parts or parts[-1] == "shared_expert_gate":
        return True
    if parts[-1] not in _ROUTER_LAST:
        return False
    if _is_narrow(layer):
        return True
    uncles = [".".join([*parts[:-depth], "experts"]) for depth in (1, 2) if len(parts) >= depth]
    return any(name.startswith(f"{uncle}.") for uncle in uncles for name in siblings)


def _is_expert(layer: LayerInfo) -> bool:
    """Whether a layer is a routed expert, in a stack or in a list. Shared ones, which every token takes, are not."""
    parts = layer.name.split(".")
    return (layer.kind == "experts" and "shared_experts" not in parts) or (
        layer.kind == "linear" and "experts" in parts
    )


def _fit(fmt: QuantFormat, columns: int, fallback: str) -> tuple[QuantFormat | None, str]:
    """The first format along the fallback chain whose block divides K, and the reason if that is not `fmt` itself."""
    if columns % fmt.block == 0:
        return fmt, ""
    misfit = f"{columns} columns are not a multiple of {fmt.block}, which {fmt.name} needs"
    if fallback == "skip":
        return None, f"{misfit}: left as it is"
    candidate: QuantFormat | None = fmt
    while candidate is not None and columns % candidate.block:
        candidate = get_format(candidate.fallback) if candidate.fallback else None
    if candidate is None:
        return None, f"{misfit}, and no larger format fits: left as it is"
    return candidate, f"{misfit}: {candidate.name} instead"


# ---- all layers together ---------------------------------------------------------------------------------------------


def _keep_experts_together(layers: Sequence[LayerInfo], decisions: list[Decision]) -> list[Decision]:
    """Pack all stacks of a module or none of them: no code runs a mix of packed and float stacks."""
    stays: dict[str, Decision] = {}
    for layer, decision in zip(layers, decisions, strict=True):
        if layer.block is not None and decision.format is None and layer.packed_as is None:
            stays.setdefault(layer.block, decision)
    return [
        decision
        if layer.block not in stays or decision.format is None
        else replace(
            decision,
            format=None,
            reason=f"{stays[layer.block].name} of the same experts stays as it is ({stays[layer.block].reason})",
            promoted=False,
            firm=True,
        )
        for layer, decision in zip(layers, decisions, strict=True)
    ]


def _agree_on_ties(layers: Sequence[LayerInfo], decisions: list[Decision], op: str) -> list[Decision]:
    """Layers that share a weight get one decision: "stay as it is" wins, then a topology entry, then a default."""
    groups: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault(layer.holder, []).append(i)
    agreed = list(decisions)
    for members in groups.values():
        if len(members) == 1:
            continue
        votes = [decisions[i] for i in members]
        firm = [d for d in votes if d.firm]
        wanted = {d.format.name for d in firm if d.format is not None}
        stays = [d for d in firm if d.format is None]
        if len(wanted) > 1 and not stays:
            raise ValueError(
                f"{op}: {firm[0].name} and {firm[-1].name} share one weight, but the topology gives them {' and '.join(sorted(wanted))}"
            )
        chosen = (stays or firm or [d for d in votes if d.format is not None] or votes)[0]
        for i in members:
            reason = chosen.reason
            if i != members[0]:
                reason = f"shares the weight of {layers[members[0]].name}"
            elif decisions[i] is not chosen and decisions[i].reason != reason:
                reason = f"as {chosen.name}, which shares the weight" + (f": {reason}" if reason else "")
            agreed[i] = replace(
                decisions[i],
                format=chosen.format,
                reason=reason,
                promoted=chosen.promoted,
                fell_back=chosen.fell_back,
                device=chosen.device,
            )
    return agreed


def _unmatched(layers: Sequence[LayerInfo], request: Request) -> list[str]:
    """Notes about topology entries and patterns that match no layer; usually they are typos."""
    names = [layer.name for layer in layers]
    unmatched = [f"topology entry {entry.key!r:.200}" for entry in request.topology.unmatched(names)]
    unmatched += [
        pattern.label
        for pattern in (*(request.included or []), *request.excluded)
        if not any(pattern.regex.search(name) for name in names)
    ]
    notes = [f"{what} matches no layer" for what in unmatched[:_UNMATCHED_NOTES]]
    if len(unmatched) > len(notes):
        notes.append(f"{len(unmatched) - len(notes)} more topology entries and patterns match no layer")
    return notes
