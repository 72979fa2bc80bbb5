"""Decoders of the DeepSeek family: shared and routed experts after some dense layers, and attention by latent vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .common import HEAD, STACKS, KeyValueHeads, trunk
from .facts import MOST, Facts
from .parts import Always, Key, Part, Present, Values
from .record import Architecture, Names
from .rope import Rope

_SIGMOID = 2


class _Groups(Part):
    """Groups of experts, of which only some are asked. Old files do not state them, and llama.cpp then asks all."""

    def read(self, facts: Facts, values: Values) -> None:
        values["n_group"] = facts.integer("expert_group_count", 1, least=1)
        values["topk_group"] = facts.integer("expert_group_used_count", values["n_group"], least=1)

    def write(self, config: Any, keys: Values) -> None:
        if (config.n_group or 1) > 1:
            keys["expert_group_count"], keys["expert_group_used_count"] = config.n_group, config.topk_group


class _Gate(Part):
    """How the scores of experts are computed. The model class has one way."""

    def __init__(self, number: int) -> None:
        self.number = number

    def read(self, facts: Facts, values: Values) -> None:
        number = facts.integer("expert_gating_func", 0, most=MOST)
        if number not in (0, self.number):
            raise facts.wrong("expert_gating_func", number, f"{self.number}, which the model class computes")

    def write(self, config: Any, keys: Values) -> None:
        keys["expert_gating_func"] = self.number


def _routed(gate: int) -> tuple[Part, ...]:
    """Experts as DeepSeek has them; 1: softmax, 2: sigmoid."""
    return (
        Key("n_routed_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
        Key("moe_intermediate_size", "expert_feed_forward_length"),
        Key("n_shared_experts", "expert_shared_count", default=0, least=0),
        Key("first_k_dense_replace", "leading_dense_block_count", default=0, least=0, most=MOST),
        Key("routed_scaling_factor", "expert_weights_scale", "number", 1.0),
        Key("norm_topk_prob", "expert_weights_norm", "flag", False),
        _Groups(),
        _Gate(gate),
    )


class _Latent(Part):
    """The widths of attention by latent vectors. Newer files state those of the latent vectors as the widths of a head."""

    def read(self, facts: Facts, values: Values) -> None:
        rank, turned = facts.integer("attention.kv_lora_rank", least=1), facts.integer("rope.dimension_count", least=1)
        key = facts.integer("attention.key_length_mla", facts.integer("attention.key_length", least=1), least=1)
        value = facts.integer("attention.value_length_mla", facts.integer("attention.value_length", least=1), least=1)
        if key <= turned:
            raise facts.wrong("attention.key_length_mla", key, f"more than the {turned} columns that turn")
        heads = values["num_attention_heads"]
        facts.integer("attention.head_count_kv", heads, least=1)  # 1 in newer files, which mean the latent vectors
        values |= {
            "num_key_value_heads": heads,
            "kv_lora_rank": rank,
            "q_lora_rank": facts.integer("attention.q_lora_rank", None, least=1),
            "qk_rope_head_dim": turned,
            "qk_nope_head_dim": key - turned,
            "v_head_dim": value,
        }

    def write(self, config: Any, keys: Values) -> None:
        keys["attention.kv_lora_rank"] = config.kv_lora_rank
        if config.q_lora_rank is not None:
            keys["attention.q_lora_rank"] = config.q_lora_rank
        keys["attention.head_count_kv"] = config.num_attention_heads
        keys["attention.key_length"] = config.qk_nope_head_dim + config.qk_rope_head_dim
        keys["attention.value_length"] = config.v_head_dim


class _LatentRope(Part):
    """The rotary embedding of the few columns that turn. The file has a tenth of DeepSeek's mscale_all_dim."""

    def read(self, facts: Facts, values: Values) -> None:
        shown = dict(values) | {"hidden_size": values["qk_rope_head_dim"], "num_attention_heads": 1}
        hidden = _NoLength(facts)
        _ROPE.read(hidden, shown)
        parameters = shown["rope_parameters"]
        multiplier = facts.number("rope.scaling.yarn_log_multiplier", None)
        if parameters["rope_type"] == "yarn" and multiplier:
            scale = round(10 * multiplier, 6)
            parameters |= {"mscale": scale, "mscale_all_dim": scale}
        values["rope_parameters"] = parameters

    def write(self, config: Any, keys: Values) -> None:
        parameters = dict(config.rope_parameters)
        scale = parameters.pop("mscale_all_dim", None)
        if scale is not None and parameters.pop("mscale", scale) != scale:
            raise ValueError(
                "mscale and mscale_all_dim of rope_parameters differ, and a GGUF file has only one of them"
            )
        shown = _Shown(config, parameters)
        found: Values = {}
        _ROPE.write(shown, found)
        keys |= found
        if scale and parameters.get("rope_type") == "yarn":
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * scale


class _NoLength(Facts):
    """The facts without the width of a head, so that `Rope` takes that of the columns that turn."""

    def __init__(self, facts: Facts) -> None:
        vars(self).update(vars(facts))
        name = f"{facts.architecture}.attention.key_length"
        self.metadata = {key: value for key, value in facts.metadata.items() if key != name}


class _Shown:
    """A config as `Rope` wants it: one head that has only the columns that turn."""

    def __init__(self, config: Any, parameters: dict[str, Any]) -> None:
        self.rope_parameters, self.head_dim = parameters, config.qk_rope_head_dim
        self.max_position_embeddings = config.max_position_embeddings


_ROPE = Rope(HEAD)


def _joined(parts: list[Tensor]) -> Tensor:
    """kv_b_proj of its two halves: keys `[heads, rank, width]`, transposed, and values `[heads, width, rank]`."""
    keys, values = parts
    return torch.cat([keys.float().transpose(1, 2), values.float()], dim=1).flatten(0, 1)


_LATENT_NAMES = (
    *STACKS,
    Names(
        r"layers\.(\d+)\.self_attn\.kv_b_proj\.weight",
        (("blk.{}.attn_kv_b.weight",), ("blk.{}.attn_k_b.weight", "blk.{}.attn_v_b.weight")),
        build=_joined,
    ),
)
_HEADS = Key("num_attention_heads", "attention.head_count")


def _deepseek(kind: str, gate: int) -> Architecture:
    return Architecture(
        "deepseek2",
        (kind,),
        (*trunk(), _HEADS, _Latent(), _LatentRope(), *_routed(gate)),
        names=_LATENT_NAMES,
        harmless=frozenset({"attention.key_length", "attention.value_length"}),
    )


class _Greedy(Part):
    """DeepSeek V2 asks all experts, or those of the best groups."""

    def read(self, facts: Facts, values: Values) -> None:
        values["topk_method"] = "group_limited_greedy" if values["n_group"] > 1 else "greedy"

    def write(self, config: Any, keys: Values) -> None:
        if config.norm_topk_prob:
            raise ValueError("norm_topk_prob is True, which the model class does not compute")


_V2, _V3 = _deepseek("deepseek_v2", 1), _deepseek("deepseek_v3", _SIGMOID)

RECORDS = (
    replace(_V3, when=lambda facts: facts.integer("expert_gating_func", 0, most=MOST) == _SIGMOID),
    replace(_V2, parts=(*_V2.parts, _Greedy())),
    Architecture(
        "glm4moe",
        ("glm4_moe",),
        (
            *trunk(),
            _HEADS,
            KeyValueHeads(),
            HEAD,
            Rope(HEAD, partial=True),
            *_routed(_SIGMOID),
            Present("use_qk_norm", "blk.0.attn_q_norm.weight"),
            Present("attention_bias", "blk.0.attn_q.bias"),
        ),
        HEAD,
        names=STACKS,
    ),
    Architecture(
        "dots1",
        ("dots1",),
        (
            *trunk(),
            _HEADS,
            KeyValueHeads(),
            HEAD,
            Rope(HEAD),
            *_routed(_SIGMOID),
            Always("sliding_window", None),
            Present("attention_bias", "blk.0.attn_q.bias"),
        ),
        HEAD,
        names=STACKS,
    ),
)
