"""Recipes: llama.cpp's mixes (`formats/mixes.py`) applied to the layers of a model.

Everything is read from names and shapes, so that a live model and the headers of a checkpoint get the same: which kind of
matrix a layer is (its GGUF name), the number of its block, how many query heads share a key-value head, and how many experts
there are. Layers that GGUF has no name for get the mix's base format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from isqtorch.formats import MIXES, Mix
from isqtorch.formats.mixes import HEAD, LAYERS_OF_70B, WITH_8_EXPERTS

from .gguf_names import gguf_names

if TYPE_CHECKING:
    from .policy import LayerInfo

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
LISTED_EXPERT = re.compile(r"(.+\.experts)\.\d+(?:\.(.+))?")
"""One of a list of experts that are ordinary layers: (path of the list, which matrix of the expert)."""
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")


class Assigned(NamedTuple):
    """What a rule for whole models gives one layer."""

    format: str | int  # a name, or a number of bits that the layer's device makes a format of
    why: str  # "" where it needs no explanation


class _Place(NamedTuple):
    block: int
    stem: str  # "attn_v", "ffn_down_exps", ...


def assign(mix_name: str, layers: Sequence[LayerInfo]) -> dict[str, Assigned]:
    """{layer: format} of a mix, for every layer; whether a layer is quantized at all is the policy's business."""
    mix = MIXES[mix_name]
    places = {layer.name: place for layer in layers if (place := _place(layer)) is not None}
    blocks = 1 + max((place.block for place in places.values()), default=-1)
    values = sorted((place.block, name) for name, place in places.items() if place.stem in _VALUES)
    rank = {name: i for i, (_, name) in enumerate(values)}
    facts = _Facts(blocks, len(values), _sharing(layers, places), _experts(layers))
    heads = {layer.tied_to or layer.name for layer in layers if layer.role == "head"} or {
        layer.name for layer in layers if gguf_names(layer.name)[0] == ["token_embd.weight"]
    }  # where no layer is the head, the table is
    out = {}
    for layer in layers:
        place = places.get(layer.name)
        fmt, what = None, ""
        if (layer.tied_to or layer.name) in heads:
            fmt, what = HEAD, "output"
        elif place is not None:
            fmt, what = _of_place(mix, place, rank.get(layer.name, 0), facts), place.stem
        out[layer.name] = Assigned(fmt or mix.base, f"{mix.name}: {what}" if fmt not in (None, mix.base) else "")
    return out


class _Facts(NamedTuple):
    blocks: int
    values: int  # matrices that are or hold a value projection
    gqa: int  # query heads per key-value head
    experts: int


def _of_place(mix: Mix, place: _Place, rank: int, facts: _Facts) -> str | None:
    """The format that a rule gives one matrix; None: the mix's base."""
    many = facts.experts == 8
    if place.stem in _VALUES:
        fmt = mix.value(rank, facts.values, facts.gqa)
        if facts.blocks == LAYERS_OF_70B and facts.gqa > 1 and (fmt or mix.base) in ("q3k", "q4k"):
            fmt = "q5k"
        return WITH_8_EXPERTS if many else fmt
    if place.stem == "attn_k":
        return WITH_8_EXPERTS if many else None
    if place.stem == "attn_output":
        return mix.output_with_8_experts if many else mix.output
    if place.stem.startswith("ffn_down"):
        return mix.down(place.block, facts.blocks, facts.gqa)
    return None


def _place(layer: LayerInfo) -> _Place | None:
    names, _ = gguf_names(layer.name)
    match = _BLOCK.fullmatch(names[0]) if names and layer.kind in ("linear", "experts") else None
    return None if match is None else _Place(int(match[1]), match[2])


def _sharing(layers: Sequence[LayerInfo], places: Mapping[str, _Place]) -> int:
    """Query heads per key-value head: rows of q over rows of k, or the rest of a joint matrix."""
    rows: dict[str, int] = {}
    for layer in layers:
        place = places.get(layer.name)
        if place is not None:
            rows.setdefault(place.stem, layer.shape[-2])
            if (
                place.stem == "attn_qkv" and layer.shape[-2] > layer.shape[-1]
            ):  # as many query rows as columns, then k and v
                rows.setdefault("joint", max(1, round(2 * layer.shape[-1] / (layer.shape[-2] - layer.shape[-1]))))
    if "attn_q" in rows and "attn_k" in rows:
        return max(1, rows["attn_q"] // rows["attn_k"])
    return rows.get("joint", 1)


def _experts(layers: Sequence[LayerInfo]) -> int:
    """How many experts a mixture has: matrices in a stack, or layers in a list; 0 where there is none."""
    stacked = [layer.shape[0] for layer in layers if layer.kind == "experts"]
    if stacked:
        return stacked[0]
    listed = Counter(match.groups() for layer in layers if (match := LISTED_EXPERT.fullmatch(layer.name)))
    return max(listed.values(), default=0)
