"""Decoders in which only some layers attend to all tokens: short convolutions (LFM2), linear attention (Qwen 3.5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .common import HEAD, HEAD_NAME, IMPLIED, STACKS, STATES, KeyValueHeads, experts, trunk
from .facts import MOST, Facts
from .layout import MINUS_EXP, ONE_ADDED, SQUEEZED, Rows, turned
from .parts import Key, Only, Part, Present, Values
from .record import Architecture, Names, Treatment
from .rope import Rope


class _Lfm2Layers(Part):
    """A layer without heads of keys is a convolution."""

    def read(self, facts: Facts, values: Values) -> None:
        counts, layers = facts.integers("attention.head_count_kv"), values["num_hidden_layers"]
        if len(counts) != layers or not 0 < max(counts) <= values["num_attention_heads"] or len({0, *counts}) > 2:
            raise facts.wrong(
                "attention.head_count_kv", counts, f"{layers} numbers: 0 for convolutions, else the same one"
            )
        values["num_key_value_heads"] = max(counts)
        values["layer_types"] = ["full_attention" if count else "conv" for count in counts]

    def write(self, config: Any, keys: Values) -> None:
        heads = config.num_key_value_heads
        keys["attention.head_count_kv"] = [heads if kind == "full_attention" else 0 for kind in config.layer_types]


class _Lfm2Width(Part):
    """The width of the MLP. A config may state another number, of which the model class computes the width."""

    def read(self, facts: Facts, values: Values) -> None:
        values["intermediate_size"] = facts.integer("feed_forward_length", least=1)
        values["block_auto_adjust_ff_dim"] = False

    def write(self, config: Any, keys: Values) -> None:
        width = config.intermediate_size
        if getattr(config, "block_auto_adjust_ff_dim", False):
            width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
            width = config.block_multiple_of * -(-width // config.block_multiple_of)
        keys["feed_forward_length"] = width


def _lfm2(name: str, kind: str) -> Architecture:
    return Architecture(
        name,
        (kind,),
        (
            *trunk(eps="norm_eps", feed_forward=None),
            _Lfm2Width(),
            Key("num_attention_heads", "attention.head_count"),
            _Lfm2Layers(),
            IMPLIED,
            Rope(IMPLIED),
            Key("conv_L_cache", "shortconv.l_cache"),
            Present("conv_bias", "blk.*.shortconv.in_proj.bias"),
        ),
        IMPLIED,
        treatments=(Treatment(r"conv\.conv\.weight", changes=(SQUEEZED,)),),
    )


# ---- Qwen 3.5 --------------------------------------------------------------------------------------------------------


class _Linear(Part):
    """Linear attention, and which layers have the other kind."""

    def read(self, facts: Facts, values: Values) -> None:
        every = facts.integer("full_attention_interval", 4, least=1, most=values["num_hidden_layers"])
        kinds = ["linear_attention"] * (every - 1) + ["full_attention"]
        values["layer_types"] = [kinds[layer % every] for layer in range(values["num_hidden_layers"])]
        heads, width = values["linear_num_value_heads"], facts.integer("ssm.inner_size", least=1)
        if width % heads or heads % values["linear_num_key_heads"]:
            raise facts.wrong(
                "ssm.inner_size", width, f"a multiple of the {heads} heads, and these one of those of keys"
            )
        values["linear_value_head_dim"] = width // heads

    def write(self, config: Any, keys: Values) -> None:
        kinds = list(config.layer_types)
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds)
        if kinds != [kinds[layer % every] for layer in range(len(kinds))]:
            raise ValueError("layer_types has no fixed interval, and a GGUF file of this architecture cannot say so")
        keys["full_attention_interval"] = every
        keys["ssm.inner_size"] = config.linear_num_value_heads * config.linear_value_head_dim


class _Sections(Part):
    """Which frequencies turn with time, height and width. For text, all three are the same."""

    def read(self, facts: Facts, values: Values) -> None:
        sections = [size for size in facts.integers("rope.dimension_sections", [11, 11, 10]) if size]
        values["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}

    def write(self, config: Any, keys: Values) -> None:
        sections = list(config.rope_parameters.get("mrope_section") or [11, 11, 10])
        keys["rope.dimension_sections"] = [*sections, *[0] * (4 - len(sections))]


def _grouped(config: Any, first: int = 0) -> Rows:
    """The heads of values: grouped by the head of keys in the model, and the groups side by side in the file."""
    groups = config.linear_num_key_heads
    return turned((config.linear_num_value_heads // groups, groups, -1), (1, 0, 2), first)


def _after_keys(config: Any) -> Rows:
    return _grouped(config, 2 * config.linear_num_key_heads * config.linear_key_head_dim)


_QWEN35 = (
    *trunk(feed_forward=None),
    Key("num_attention_heads", "attention.head_count"),
    KeyValueHeads(),
    HEAD,
    Rope(HEAD, partial=True),
    _Sections(),
    Key("linear_conv_kernel_dim", "ssm.conv_kernel"),
    Key("linear_key_head_dim", "ssm.state_size"),
    Key("linear_num_key_heads", "ssm.group_count"),
    Key("linear_num_value_heads", "ssm.time_step_rank"),
    _Linear(),
)
_DENSE35 = Architecture(
    "qwen35",
    ("qwen3_5_text",),
    (*_QWEN35, Key("intermediate_size", "feed_forward_length")),
    HEAD,
    names=STATES,
    treatments=(
        Treatment(
            r"(?:input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm|model\.norm)\.weight",
            changes=(ONE_ADDED,),
        ),
        Treatment(r"linear_attn\.A_log", rows=_grouped, changes=(MINUS_EXP,)),
        Treatment(r"linear_attn\.(?:dt_bias|in_proj_[abz]\.weight)", rows=_grouped),
        Treatment(r"linear_attn\.in_proj_qkv\.weight", rows=_after_keys),
        Treatment(r"linear_attn\.conv1d\.weight", rows=_after_keys, changes=(SQUEEZED,)),
        Treatment(r"linear_attn\.out_proj\.weight", columns=_grouped),
    ),
)

_LFM2, _LFM2_MOE = _lfm2("lfm2", "lfm2"), _lfm2("lfm2moe", "lfm2_moe")


class _Sigmoid(Part):
    """Scores of experts are sigmoids, and the weights of the chosen ones are divided by their sum."""

    def read(self, facts: Facts, values: Values) -> None:
        Only("expert_gating_func", (2,)).read(facts, values)
        values["norm_topk_prob"] = facts.flag("expert_weights_norm", True)
        values["routed_scaling_factor"] = facts.number("expert_weights_scale", 1.0) or 1.0
        values["use_expert_bias"] = any(name.endswith("exp_probs_b.bias") for name in facts.shapes)

    def write(self, config: Any, keys: Values) -> None:
        if not config.norm_topk_prob or config.routed_scaling_factor != 1.0:
            raise ValueError(
                "norm_topk_prob and routed_scaling_factor must be True and 1, which llama.cpp computes with"
            )
        keys["expert_gating_func"] = 2


RECORDS = (
    _LFM2,
    replace(
        _LFM2_MOE,
        parts=(
            *(part for part in _LFM2_MOE.parts if not isinstance(part, _Lfm2Width)),
            Key("intermediate_size", "feed_forward_length"),
            *experts("num_experts"),
            Key("num_dense_layers", "leading_dense_block_count", least=0, most=MOST),
            _Sigmoid(),
        ),
        names=(*STACKS, HEAD_NAME, Names(r"layers\.(\d+)\.feed_forward\.expert_bias", (("blk.{}.exp_probs_b.bias",),))),
    ),
    _DENSE35,
    replace(
        _DENSE35,
        name="qwen35moe",
        model_types=("qwen3_5_moe_text",),
        parts=(
            *_QWEN35,
            *experts("num_experts"),
            Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ),
        names=(
            *STACKS,
            *STATES,
            Names(r"layers\.(\d+)\.mlp\.shared_expert_gate\.weight", (("blk.{}.ffn_gate_inp_shexp.weight",),)),
        ),
    ),
)
