"""llama.cpp's mixes of formats: which format each matrix of a language model gets.

A mix is a rule for a whole model: `q4k_m` is mostly q4k, with q6k for the value and down projections of half of the
blocks. The rules are those of llama.cpp's `llama_tensor_get_type` for models like Llama, without the exceptions for
Falcon. If a format of a mix does not fit a layer, the fallback of that format applies, as in llama.cpp.

The rules need only names and shapes, so a live model and the headers of a checkpoint get the same formats. They read
the kind of a matrix (its GGUF name), the number of its block, the query heads per key-value head, and the number of
experts. A layer without a GGUF name gets the base format of the mix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isqtorch.files.gguf_names import gguf_names
from isqtorch.formats.base import register_mix

from .layers import LayerInfo
from .request import Assigned

Rule = Callable[[int, int, int], "str | None"]
"""(index i among n matrices of this kind, n, query heads per key-value head) -> format, or None for the base format."""


HEAD = "q6k"  # format of output.weight, also where it is tied to the embedding
WITH_8_EXPERTS = "q8_0"  # format of keys and values in models with 8 experts, where they are small
LAYERS_OF_70B = 80  # blocks of Llama 2 70B, whose values are 8 times smaller than its queries


@dataclass(frozen=True)
class Mix:
    """One file type.

    Attributes:
        base: format of all matrices without a rule.
        value: rule for attn_v, attn_qkv and attn_kv_b.
        down: rule for ffn_down, dense or of experts; i is the number of the block.
        output: format of attn_output, or None for the base format.
        output_with_8_experts: format of attn_output in models with 8 experts.
    """

    name: str
    base: str
    value: Rule
    down: Rule
    output: str | None = None
    output_with_8_experts: str | None = None


def more_bits(i: int, n: int) -> bool:
    """Whether block i of n is in the first or last eighth, or is every third of the others."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _none(i: int, n: int, gqa: int) -> str | None:
    return None


def _when_more(fmt: str) -> Rule:
    return lambda i, n, gqa: fmt if more_bits(i, n) else None


MIXES = {
    mix.name: mix
    for mix in (
        # llama.cpp calls this mix Q2_K; here that is the name of the format
        Mix("q2k_m", "q2k", lambda i, n, gqa: "q4k" if gqa >= 4 else "q3k", lambda i, n, gqa: "q3k", "q3k", "q5k"),
        Mix(
            "q2k_s",
            "q2k",
            lambda i, n, gqa: "q4k" if gqa >= 4 else None,
            lambda i, n, gqa: "q4k" if i < n // 8 else None,
        ),
        Mix("q3k_s", "q3k", _none, _none, None, "q5k"),
        Mix(
            "q3k_m",
            "q3k",
            lambda i, n, gqa: "q5k" if i < 2 else "q4k",
            lambda i, n, gqa: "q5k" if i < n // 16 else "q4k",
            "q4k",
            "q5k",
        ),
        Mix("q3k_l", "q3k", lambda i, n, gqa: "q5k", lambda i, n, gqa: "q5k", "q5k"),
        Mix(
            "q4k_s",
            "q4k",
            lambda i, n, gqa: "q5k" if i < 4 else None,
            lambda i, n, gqa: "q5k" if i < n // 8 else None,
            None,
            "q5k",
        ),
        Mix("q4k_m", "q4k", _when_more("q6k"), _when_more("q6k"), None, "q5k"),
        Mix("q5k_s", "q5k", _none, _none),
        Mix("q5k_m", "q5k", _when_more("q6k"), _when_more("q6k")),
    )
}

for _mix in MIXES.values():
    register_mix(_mix.name, _mix.name.replace("k_", "_k_"))

# ---- which layer is what --------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
LISTED_EXPERT = re.compile(r"(.+\.experts)\.\d+(?:\.(.+))?")
"""Matches an expert that is an ordinary layer in a list. Groups: path of the list, name of the expert's matrix."""
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")


class _Place(NamedTuple):
    block: int
    stem: str  # "attn_v", "ffn_down_exps", ...


def assign(mix_name: str, layers: Sequence[LayerInfo]) -> dict[str, Assigned]:
    """{layer: format} of a mix, for every layer. `decide` finds out whether the layer is quantized at all."""
    mix = MIXES[mix_name]
    places = {layer.name: place for layer in layers if (place := _place(layer)) is not None}
    blocks = 1 + max((place.block for place in places.values()), default=-1)
    values = sorted((place.block, name) for name, place in places.items() if place.stem in _VALUES)
    rank = {name: i for i, (_, name) in enumerate(values)}
    facts = _Facts(blocks, len(values), _sharing(layers, places), _experts(layers))
    heads = {layer.holder for layer in layers if layer.role == "head"} or {
        layer.name for layer in layers if gguf_names(layer.name)[0] == ["token_embd.weight"]
    }  # without a separate head, the embedding is the head
    out = {}
    for layer in layers:
        place = places.get(layer.name)
        fmt, what = None, ""
        if layer.holder in heads:
            fmt, what = HEAD, "output"
        elif place is not None:
            fmt, what = _of_place(mix, place, rank.get(layer.name, 0), facts), place.stem
        out[layer.name] = Assigned(fmt or mix.base, f"{mix.name}: {what}" if fmt not in (None, mix.base) else "")
    return out


class _Facts(NamedTuple):
    blocks: int
    values: int  # number of matrices that are or contain a value projection
    gqa: int  # query heads per key-value head
    experts: int


def _of_place(mix: Mix, place: _Place, rank: int, facts: _Facts) -> str | None:
    """The format that the rules give one matrix; None: the base format."""
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
    """Query heads per key-value head: rows of q over rows of k, or computed from the shape of a joint qkv matrix."""
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
    """Number of experts in each MoE block: matrices in a stack, or layers in a list; 0 for a dense model."""
    stacked = [layer.shape[0] for layer in layers if layer.kind == "experts"]
    if stacked:
        return max(stacked)  # a stack of shared experts has fewer
    listed = Counter(match.groups() for layer in layers if (match := LISTED_EXPERT.fullmatch(layer.name)))
    return max(listed.values(), default=0)
