"""config.json of an MLX folder: that of transformers, and the names that mlx-lm looks for.

mlx-lm reads the names that settings had before transformers 5, and takes a default where it finds none. So a setting
that is missing is no error there, but another model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from .outgoing import is_tied
from .settings import KEYS, Setting

Entries = dict[str, Any]


def configuration(model: Any, settings: Mapping[str, Setting], op: str) -> Entries:
    """The content of config.json.

    Args:
        model: the model.
        settings: {path of a quantized module in MLX: its setting}.
        op: name of the calling function, for messages.

    Raises:
        ValueError: mlx-lm cannot be told a setting of the model.
    """
    entries = _entries(model.config)
    for key in KEYS:
        entries.pop(key, None)  # the record of isqtorch
    kind = str(entries.get("model_type"))
    older = _rope(entries) | {name: entries.get(own) for name, own in type(model.config).attribute_map.items()}
    entries |= {name: value for name, value in older.items() if entries.get(name) is None}
    if kind in _OLDER:
        entries |= _OLDER[kind](entries)
    if kind in _PERIODS:
        entries |= _pattern(entries, kind, op)
    entries["architectures"] = [type(model).__name__]
    entries["tie_word_embeddings"] = is_tied(model)
    if settings:
        (default, _), *_ = Counter(settings.values()).most_common(1)
        own = {path: setting.entry() for path, setting in settings.items() if setting != default}
        for key in KEYS:
            entries[key] = {**default.entry(), **own}
    return entries


def refusal(config: Any) -> str | None:
    """Why mlx-lm would compute a model otherwise, or None."""
    entries, why = _entries(config), _REFUSED.get(config.model_type)
    rope = _whole(entries)
    if rope.get("rope_type") == "longrope":
        return "which takes the factors of long texts for short ones too (longrope)"
    if rope.get("attention_factor") is not None:
        return "which has no attention_factor of rotary positions"
    return None if why is None else why(entries)


def _entries(config: Any) -> Entries:
    entries: Entries = json.loads(config.to_json_string(use_diff=False))
    return entries


def _rope(entries: Entries) -> Entries:
    """The settings of rotary positions, which were not in `rope_parameters` before."""
    rope = entries.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    whole = _whole(entries)
    older = {"rope_theta": whole.get("rope_theta"), "rope_scaling": _scaling(whole)}
    if "partial_rotary_factor" in whole:
        older["partial_rotary_factor"] = whole["partial_rotary_factor"]
    local = rope.get("sliding_attention")
    if isinstance(local, dict):
        older["rope_local_base_freq"] = local.get("rope_theta")
    return older


def _whole(entries: Entries) -> Entries:
    """The rotary positions of the layers that attend to the whole text."""
    rope = entries.get("rope_parameters") or {}
    by_layer = all(isinstance(value, dict) for value in rope.values())
    found: Entries = rope.get("full_attention") or next(iter(rope.values()), {}) if by_layer else rope
    return found


def _scaling(rope: Entries) -> Entries | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    kept = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return kept | {"type": kind}


def _pattern(entries: Entries, kind: str, op: str) -> Entries:
    """After how many layers attention to the whole text returns. mlx-lm has no list of the layers."""
    layers: list[str] = entries.get("layer_types") or []
    whole = [number for number, name in enumerate(layers, 1) if name == "full_attention"]
    period = whole[0] if whole else len(layers) + 1
    if whole != list(range(period, len(layers) + 1, period)):
        raise ValueError(
            f"{op}: mlx-lm takes for granted that attention to the whole text returns after the same number of layers, and in {layers} "
            "it does not"
        )
    if kind == "exaone4":
        return {_PERIODS[kind]: "L" * (period - 1) + "G" if whole and period > 1 else None}
    return {_PERIODS[kind]: period}


_PERIODS = {
    "cohere2": "sliding_window_pattern",
    "exaone4": "sliding_window_pattern",  # a string of L (local) and G (global)
    "gemma3_text": "sliding_window_pattern",
    "qwen3_next": "full_attention_interval",
}


def _neox(entries: Entries) -> Entries:
    return {
        "rotary_emb_base": entries.get("rope_theta", 10000),
        "rotary_pct": entries.get("partial_rotary_factor", 1.0),
    }


def _width(entries: Entries) -> int:
    """The width of a head, where the configuration leaves it to the usual rule."""
    return int(entries["hidden_size"]) // int(entries["num_attention_heads"])


def _granite(entries: Entries) -> Entries:
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    return {"layer_types": [names.get(name, name) for name in entries.get("layer_types") or []]}


# What mlx-lm computes otherwise than transformers, or has no class for: the folder would load, and answer nonsense.
_REFUSED: dict[str, Callable[[Entries], str | None]] = {
    "deepseek_v2": lambda entries: None if _scaling(_whole(entries)) else "which needs scaled (YaRN) rotary positions",
    "exaone": lambda entries: "which reads another configuration",
    "glm": lambda entries: _partial(entries),
    "gpt_neox": lambda entries: (
        None
        if entries["intermediate_size"] == 4 * entries["hidden_size"]
        else "whose hidden layers have four times the size of the model"
    ),
    "jamba": lambda entries: "whose results differ from those of transformers",
    "qwen3_5_text": lambda entries: "which reads it as a part of a model with images only",
    "qwen3_5_moe_text": lambda entries: "which reads it as a part of a model with images only",
}


def _partial(entries: Entries) -> str | None:
    turned = _whole(entries).get("partial_rotary_factor") or entries.get("partial_rotary_factor") or 1.0
    return None if turned == 1.0 else f"which turns all of a head in place of the part {turned}"


_OLDER: dict[str, Callable[[Entries], Entries]] = {
    "apertus": lambda entries: {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "exaone4": lambda entries: {"head_dim": entries.get("head_dim") or _width(entries)},
    "exaone_moe": lambda entries: {"is_moe_layer": [name == "sparse" for name in entries["mlp_layer_types"]]},
    "gpt2": lambda entries: {"n_ctx": entries["n_positions"]},
    "gpt_bigcode": lambda entries: {"n_inner": entries.get("n_inner") or 4 * entries["n_embd"]},
    "gpt_neox": _neox,
    "granitemoehybrid": _granite,
    "lfm2": lambda entries: {"block_dim": entries["hidden_size"]},
    "mamba2": lambda entries: {"intermediate_size": int(entries["expand"] * entries["hidden_size"])},
    "solar_open": lambda entries: {"partial_rotary_factor": entries.get("partial_rotary_factor") or 1.0},
}
