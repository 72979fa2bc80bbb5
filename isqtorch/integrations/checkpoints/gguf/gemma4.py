"""Gemma 4: layers of two widths of heads, tables of embeddings for each layer, keys that later layers reuse, experts."""

from __future__ import annotations

from typing import Any

from .common import STACKS, trunk
from .facts import MOST, Facts
from .parts import HeadDim, Key, Part, Values
from .record import Architecture, Names

_FULL, _WINDOW = "full_attention", "sliding_attention"


class _FullHead(HeadDim):
    """The width of a head of the layers that attend to everything."""

    def of(self, config: Any) -> int:
        return _of_full(config, "head_dim")


def _of_window(config: Any, name: str) -> int:
    """A value of the layers with a window. The config refuses to give it as an attribute."""
    return int(config.to_dict()[name])


def _of_full(config: Any, name: str) -> int:
    """A value of the layers that attend to everything, which may differ from the others'."""
    overrides = config.to_dict().get("per_layer_config") or {}
    default = _of_window(config, name)
    found = {int(layer): values.get(name, default) for layer, values in overrides.items()}
    full = [layer for layer, kind in enumerate(config.layer_types) if kind == _FULL]
    values = {found.get(layer, default) for layer in full}
    if len(values) > 1 or set(found) - set(full):
        raise ValueError(f"{name} differs between layers of one kind, and a GGUF file cannot say so")
    return int(values.pop()) if values else default


class _Layers(Part):
    """Which layers have a window, and the heads of both kinds."""

    def read(self, facts: Facts, values: Values) -> None:
        count = values["num_hidden_layers"]
        pattern = facts.flags("attention.sliding_window_pattern", count)
        kinds = [_WINDOW if flag else _FULL for flag in pattern]
        values["layer_types"] = kinds
        values["sliding_window"] = facts.integer("attention.sliding_window", least=1, most=MOST)
        for kind in ("key", "value"):
            width = facts.integer(f"attention.{kind}_length", least=1)
            local = facts.integer(f"attention.{kind}_length_swa", width, least=1)
            if values.setdefault("global_head_dim", width) != width or values.setdefault("head_dim", local) != local:
                raise facts.wrong(f"attention.{kind}_length", width, "the width of keys")
        heads = facts.integers("attention.head_count_kv")
        heads = heads * count if len(heads) == 1 else heads
        if len(heads) != count or not all(0 < each <= facts.largest for each in heads):
            raise facts.wrong("attention.head_count_kv", heads, f"one number, or {count}, one for each layer")
        found = {kind: {each for each, other in zip(heads, kinds, strict=True) if other == kind} for kind in set(kinds)}
        if any(len(each) > 1 for each in found.values()):
            raise facts.wrong("attention.head_count_kv", heads, "the same for all layers of one kind")
        full = next(iter(found.get(_FULL, found.get(_WINDOW, {1}))))
        values["num_key_value_heads"] = next(iter(found.get(_WINDOW, {full})))
        values["num_kv_shared_layers"] = facts.integer("attention.shared_kv_layers", 0, most=count - 1)
        own = [layer for layer, kind in enumerate(kinds[: count - values["num_kv_shared_layers"]]) if kind == _FULL]
        values["attention_k_eq_v"] = bool(own) and f"blk.{own[0]}.attn_v.weight" not in facts.shapes
        if full != values["num_key_value_heads"]:
            values["num_global_key_value_heads"] = full

    def write(self, config: Any, keys: Values) -> None:
        kinds = list(config.layer_types)
        keys["attention.sliding_window_pattern"] = [kind == _WINDOW for kind in kinds]
        keys["attention.sliding_window"] = config.sliding_window
        keys["attention.key_length"] = keys["attention.value_length"] = _of_full(config, "head_dim")
        keys["attention.key_length_swa"] = keys["attention.value_length_swa"] = _of_window(config, "head_dim")
        heads = {
            _WINDOW: _of_window(config, "num_key_value_heads"),
            _FULL: _of_full(config, "num_key_value_heads"),
        }
        keys["attention.head_count_kv"] = [heads[kind] for kind in kinds]
        keys["attention.shared_kv_layers"] = config.num_kv_shared_layers


class _Rotary(Part):
    """Two rotary embeddings. `config.py` reads the share of a head that turns from a tensor."""

    def read(self, facts: Facts, values: Values) -> None:
        for key, width in (("rope.dimension_count", "global_head_dim"), ("rope.dimension_count_swa", "head_dim")):
            turned = facts.integer(key, values[width], least=1)
            if turned != values[width]:
                raise facts.wrong(key, turned, f"{values[width]}, the width of a head")
        values["rope_parameters"] = {
            _WINDOW: {"rope_type": "default", "rope_theta": facts.number("rope.freq_base_swa", 10_000.0)},
            _FULL: {"rope_type": "proportional", "rope_theta": facts.number("rope.freq_base", 1_000_000.0)},
        }

    def write(self, config: Any, keys: Values) -> None:
        local, full = config.rope_parameters[_WINDOW], config.rope_parameters[_FULL]
        if (local["rope_type"], full["rope_type"]) != ("default", "proportional"):
            raise ValueError("rope_parameters are not those of Gemma 4, and a GGUF file cannot say so")
        keys["rope.freq_base"], keys["rope.freq_base_swa"] = float(full["rope_theta"]), float(local["rope_theta"])
        keys["rope.dimension_count"], keys["rope.dimension_count_swa"] = (
            _of_full(config, "head_dim"),
            _of_window(config, "head_dim"),
        )


class _Width(Part):
    """The width of the MLP. Layers that reuse keys may have twice the width."""

    def read(self, facts: Facts, values: Values) -> None:
        widths = facts.integers("feed_forward_length")
        own = values["num_hidden_layers"] - values["num_kv_shared_layers"]
        double = [widths[0]] * own + [2 * widths[0]] * values["num_kv_shared_layers"]
        if not 0 < widths[0] <= facts.largest or (len(set(widths)) > 1 and widths != double):
            raise facts.wrong("feed_forward_length", widths, "one width, or twice as much in layers that reuse keys")
        values["intermediate_size"] = widths[0]
        values["use_double_wide_mlp"] = len(set(widths)) > 1

    def write(self, config: Any, keys: Values) -> None:
        width, shared = config.intermediate_size, config.num_kv_shared_layers
        wide = config.use_double_wide_mlp and shared
        widths = [width] * (config.num_hidden_layers - shared) + [2 * width] * shared
        keys["feed_forward_length"] = widths if wide else width


class _Tables(Part):
    """Embeddings for each layer, which small models have."""

    def read(self, facts: Facts, values: Values) -> None:
        size = facts.integer("embedding_length_per_layer_input", 0)
        values["hidden_size_per_layer_input"] = size
        if size:
            values["vocab_size_per_layer_input"] = facts.shape("per_layer_token_embd.weight")[0]

    def write(self, config: Any, keys: Values) -> None:
        keys["embedding_length_per_layer_input"] = config.hidden_size_per_layer_input or 0


class _Experts(Part):
    """Experts beside the MLP, which one model has."""

    def read(self, facts: Facts, values: Values) -> None:
        count = facts.integer("expert_count", 0)
        values["enable_moe_block"] = count > 0
        if count:
            values["num_experts"] = count
            values["top_k_experts"] = facts.integer("expert_used_count", least=1, most=count)
            values["moe_intermediate_size"] = facts.integer("expert_feed_forward_length", least=1)

    def write(self, config: Any, keys: Values) -> None:
        if config.enable_moe_block:
            keys["expert_count"], keys["expert_used_count"] = config.num_experts, config.top_k_experts
            keys["expert_feed_forward_length"] = config.moe_intermediate_size


class _Cap(Part):
    """The bound of the logits: 0 in a file means none, and no key means 30."""

    def read(self, facts: Facts, values: Values) -> None:
        values["final_logit_softcapping"] = facts.number("final_logit_softcapping", 30.0) or None

    def write(self, config: Any, keys: Values) -> None:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping or 0.0)


_HEAD = _FullHead()
_BLOCK = r"layers\.(\d+)\."

RECORDS = (
    Architecture(
        "gemma4",
        ("gemma4_text",),
        (
            *trunk(feed_forward=None),
            Key("num_attention_heads", "attention.head_count"),
            _Layers(),
            _Width(),
            _Rotary(),
            _Tables(),
            _Experts(),
            _Cap(),
        ),
        _HEAD,
        names=(
            Names(
                _BLOCK + r"experts\.gate_up_proj",
                (("blk.{}.ffn_gate_up_exps.weight",), ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight")),
            ),
            Names(_BLOCK + r"experts\.down_proj", (("blk.{}.ffn_down_exps.weight",),)),
            Names(_BLOCK + r"router\.proj\.weight", (("blk.{}.ffn_gate_inp.weight",),)),
            Names(_BLOCK + r"router\.scale", (("blk.{}.ffn_gate_inp.scale",),)),
            Names(_BLOCK + r"router\.per_expert_scale", (("blk.{}.ffn_down_exps.scale",),)),
            Names(_BLOCK + r"layer_scalar", (("blk.{}.layer_output_scale.weight",),)),
            *STACKS,
        ),
        # Layers that reuse the keys of others have none of their own, but some files do.
        ignored=r"rope_freqs\.weight|blk\.\d+\.attn_(k|v|k_norm)\.weight",
    ),
)
