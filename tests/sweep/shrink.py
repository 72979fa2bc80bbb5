"""A small configuration for any type of model: numbers are recognized by their names.

The default configuration of a type has the sizes of a real model. `candidates` gives smaller ones, the smallest first.
A type whose parts have to fit together in its own way refuses the smallest, and takes one of the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

VOCABULARY = 512
_HIDDEN, _HEADS, _HEAD = 256, 4, 64  # heads times the size of a head is the hidden size, as most types want

# Names of numbers of layers.
_DEPTH = r"(num_|n_)?(\w+_)?(layers?|blocks|depth)(_\w*(encoder|decoder))?|depth|num_layers_\w+|\w*_depth"
_NO_DEPTH = r"\w*(interval|period|freq|step|start|index|stride|dim|size|heads|per|feat_extract|dense|shared)\w*"
_BY_STAGE = r"depths|hidden_sizes"  # lists with an entry for each stage; the number of stages stays
# The first rule whose name matches decides: (regular expression of the whole name, largest value).
_COUNTS = (
    (r"num_kv_shared_layers", 0),
    (
        r"first_k_dense_replace|num_dense_layers|topk_group|n_group|num_expert_group|moe_layer_start_index|num_nextn_predict_layers",
        1,
    ),
    (r"\w*(experts_per_tok(en)?|top_k_experts|experts_top_k|moe_topk|moe_k|num_selected_experts)|moe_top_k", 2),
    (r"(num|n)_(\w+_)?experts|moe_num_experts|\w*zero_expert_num", 4),
)
_WIDTHS = (
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|\w*_key_value_heads|linear_num_key_heads", 2),
    (r"mamba_(n|num)_heads", 2 * _HEADS),  # the inner size is twice the hidden size
    (r"\w*(attention_heads|num_heads|n_heads?|num_value_heads)", _HEADS),
    (r"\w*head_dim|\w*head_size|d_kv|kv_channels|attention_key_size", _HEAD),
    (r"\w*lora_rank|\w*time_step_rank", _HEAD),
    (r"\w*hidden_size|d_model|n_embd|dim|\w*embed_dim|hidden_dim|emb_dim|embedding_size|projection_dim", _HIDDEN),
    (r"\w*(intermediate_size\w*|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim|inner_dim)|linear_units", _HIDDEN),
    (r"max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx", 512),
)
_DEEPEST = 4
_PATCH = 16  # of models that name none


def candidates(defaults: Mapping[str, Any], corrections: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Smaller configurations, the smallest first.

    Args:
        defaults: the default configuration of a type, as `to_dict` gives it.
        corrections: what the family needs otherwise; see `corrected`.
    """
    for widths in (True, False):
        yield corrected(shrunk(defaults, widths), corrections)


def corrected(config: dict[str, Any], corrections: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with other values; "text_config.head_dim" is a value of a part."""
    for name, value in corrections.items():
        *path, last = name.split(".")
        part = config
        for each in path:
            part = part[each]
        part[last] = value
    return config


def shrunk(defaults: Mapping[str, Any], widths: bool) -> dict[str, Any]:
    """A configuration with few layers and tokens; with `widths`, also with narrow layers."""
    small = dict(defaults)
    kept = _kept_layers(defaults)
    stages = _stages(defaults)
    lengths = {
        len(value) for key, value in defaults.items() if re.fullmatch(_BY_STAGE, key) and isinstance(value, list)
    }
    for name, value in defaults.items():
        if isinstance(value, Mapping) and value and kept and all(str(key).isdigit() for key in value):
            small[name] = {str(kept.index(int(key))): each for key, each in value.items() if int(key) in kept}
        elif isinstance(value, Mapping) and ("model_type" in value or name.endswith("_config")):
            small[name] = shrunk(value, widths)
        elif name == "rope_parameters" and isinstance(value, Mapping) and widths:
            small[name] = _narrow_sections(value, defaults)
        elif type(value) is int and _is_depth(name) and value not in lengths:
            small[name] = min(value, len(kept) or max(2, len(stages)))
        elif isinstance(value, list) and kept and len(value) == _depth(defaults):
            small[name] = [value[i] for i in kept]
        elif isinstance(value, list) and re.fullmatch(r"\w*depths|num_blocks", name):
            small[name] = [1 for _ in value]
        elif type(value) is int and "vocab_size" in name and value > VOCABULARY:
            small[name] = VOCABULARY
        elif type(value) is int:
            small[name] = min(value, _largest(name, value, widths))
    if stages:  # the layers of which a backbone gives the outputs: the last ones
        last = range(small["num_hidden_layers"] - len(stages) + 1, small["num_hidden_layers"] + 1)
        small |= {"out_features": [f"stage{i}" for i in last], "out_indices": list(last)}
    _move_tokens(small)
    if widths and "qk_head_dim" in small:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if widths and type(small.get("image_size")) is int:
        patch = small.get("patch_size")
        small["image_size"] = min(small["image_size"], 4 * (patch if type(patch) is int else _PATCH))
    many = (small.get("num_attention_heads"), defaults.get("num_attention_heads"))
    groups = defaults.get("num_key_value_heads")
    if widths and type(many[0]) is int and groups is not None and groups == many[1]:
        small["num_key_value_heads"] = many[0]  # some types have no groups
    return small


def _is_depth(name: str) -> bool:
    return re.fullmatch(_DEPTH, name) is not None and re.fullmatch(_NO_DEPTH, name) is None


def _largest(name: str, value: int, widths: bool) -> int:
    rules = (*_COUNTS, *(_WIDTHS if widths else ()))
    return next((largest for rule, largest in rules if re.fullmatch(rule, name)), value)


def _depth(defaults: Mapping[str, Any]) -> int:
    value = defaults.get("num_hidden_layers", defaults.get("num_layers", 0))
    return value if type(value) is int else 0


def _kept_layers(defaults: Mapping[str, Any]) -> list[int]:
    """One layer of every kind, in their order, and at least two. Kinds are what lists say about each layer."""
    depth = _depth(defaults)
    lists = [value for value in defaults.values() if isinstance(value, list) and len(value) == depth > 2]
    if not lists:
        return []
    first: dict[str, int] = {}
    for i in range(depth):
        first.setdefault(repr([each[i] for each in lists]), i)
    kept = sorted(first.values())[:_DEEPEST]
    return kept if len(kept) > 1 else [0, 1]


def _stages(defaults: Mapping[str, Any]) -> list[str]:
    """The names of the outputs of a backbone whose stages are its layers."""
    stages = defaults.get("out_features")
    return stages if isinstance(stages, list) and _depth(defaults) > len(stages) and "depths" not in defaults else []


def _narrow_sections(rope: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions with several axes share the channels of a head; smaller heads have less of them."""
    heads, hidden = defaults.get("num_attention_heads"), defaults.get("hidden_size")
    head = defaults.get("head_dim") or (hidden // heads if heads and hidden else _HEAD)
    sections = rope.get("mrope_section")
    if not isinstance(sections, list):
        return dict(rope)
    return {**rope, "mrope_section": [each * _HEAD // max(head, _HEAD) for each in sections]}


def _move_tokens(config: dict[str, Any]) -> None:
    """Give tokens that lie outside of the smaller vocabulary a place in it, each its own, at its end."""
    size = config.get("vocab_size")
    tokens = VOCABULARY if type(size) is not int else size
    place = tokens - 1
    for name, value in config.items():
        if not re.fullmatch(r"\w*(token_id|token_index|_token|padding_idx)", name):
            continue
        if isinstance(value, list) and any(type(each) is int and each >= tokens for each in value):
            config[name] = [place]
        elif type(value) is int and value >= tokens:
            config[name] = place
        else:
            continue
        place -= 1
