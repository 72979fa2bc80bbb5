"""Decoders with experts."""

from __future__ import annotations

from typing import Any

from .common import HEAD, HEADS, IMPLIED, PAIRED, STACKS, decoder, experts, has_experts, trunk
from .facts import MOST, Facts
from .layout import alternating
from .parts import Always, Derived, Key, Layers, Only, Part, Present, Values
from .record import Architecture, Names, Treatment
from .rope import Rope

_ATTENTION_BIAS = Present("attention_bias", "blk.0.attn_q.bias")
_GATING = {1: "softmax", 2: "sigmoid"}
_SOFTMAX = Only("expert_gating_func", (1,))
_SIGMOID = Only("expert_gating_func", (2,), 2)
_NORMED = Only("expert_weights_norm", (True,))
_PLAIN_WEIGHTS = Only("expert_weights_scale", (0, 0.0, 1, 1.0))  # files have 0 where the model has none


class _Normed(Part):
    """Whether the weights of the chosen experts are divided by their sum.

    Attributes:
        usual: what llama.cpp does with a file that does not say it.
    """

    def __init__(self, usual: bool) -> None:
        self.usual = usual

    def read(self, facts: Facts, values: Values) -> None:
        values["norm_topk_prob"] = facts.flag("expert_weights_norm", self.usual)

    def write(self, config: Any, keys: Values) -> None:
        if config.norm_topk_prob != self.usual:
            raise ValueError(f"norm_topk_prob is {config.norm_topk_prob}, and llama.cpp computes with {self.usual}")


_UNUSED_WIDTH = Key(
    "intermediate_size", "feed_forward_length", default=None, most=MOST
)  # of dense layers; there are none

_QWEN2 = (
    *trunk(feed_forward=None),
    _UNUSED_WIDTH,
    *HEADS,
    IMPLIED,
    Rope(IMPLIED),
    *experts("num_experts"),
    Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    _Normed(False),
    _SOFTMAX,
    _PLAIN_WEIGHTS,
    Always("decoder_sparse_step", 1),
    Always("mlp_only_layers", []),
)
_QWEN3 = (
    *trunk(feed_forward=None),
    _UNUSED_WIDTH,
    *HEADS,
    HEAD,
    Rope(HEAD),
    *experts("num_experts"),
    _ATTENTION_BIAS,
    _Normed(True),
    _SOFTMAX,
    _PLAIN_WEIGHTS,
    Always("decoder_sparse_step", 1),
    Always("mlp_only_layers", []),
)
_GRANITE = (
    Key("attention_multiplier", "attention.scale", "number"),
    Key("embedding_multiplier", "embedding_scale", "number"),
    Key("residual_multiplier", "residual_scale", "number"),
    Key("logits_scaling", "logit_scale", "number"),
)


def _last_layer(config: Any) -> int:
    return int(config.num_hidden_layers) - 1


RECORDS = (
    Architecture(
        "llama",
        ("mixtral",),
        (*decoder(), *experts("num_local_experts", width=None), _SOFTMAX, _NORMED, _PLAIN_WEIGHTS),
        HEAD,
        names=STACKS,
        treatments=PAIRED,
        when=has_experts,
    ),
    Architecture("qwen2moe", ("qwen2_moe",), _QWEN2, IMPLIED, names=STACKS),
    Architecture("qwen3moe", ("qwen3_moe",), _QWEN3, HEAD, names=STACKS),
    Architecture(
        "qwen3vlmoe",
        (),
        _QWEN3,
        HEAD,
        names=STACKS,
        reads_as="qwen3_moe",
        harmless=frozenset({"rope.dimension_sections", "n_deepstack_layers"}),
        note="the file has the text part of a Qwen3-VL model, which is a Qwen3 model",
    ),
    Architecture(
        "gpt-oss",
        ("gpt_oss",),
        (
            *trunk(feed_forward=None),
            *HEADS,
            HEAD,
            Rope(always={"truncate": False}),
            Layers(2),
            *experts("num_local_experts", width="intermediate_size"),
            Only("expert_gating_func", (3,)),  # the softmax of the chosen experts
        ),
        HEAD,
        names=(
            *STACKS,
            Names(r"layers\.(\d+)\.mlp\.router\.bias", (("blk.{}.ffn_gate_inp.bias",),)),
            Names(r"layers\.(\d+)\.self_attn\.sinks", (("blk.{}.attn_sinks.weight",),)),
            Names(r"layers\.(\d+)\.post_attention_layernorm\.weight", (("blk.{}.post_attention_norm.weight",),)),
        ),
        treatments=(Treatment(r"experts\.gate_up_proj(?:_bias)?", rows=lambda config: alternating()),),
        written=lambda config: {"feed_forward_length": config.intermediate_size},
        harmless=frozenset({"feed_forward_length"}),
    ),
    Architecture(
        "granitemoe",
        ("granitemoe",),
        (*decoder(Rope(IMPLIED), IMPLIED), *experts("num_local_experts", width=None), *_GRANITE, _ATTENTION_BIAS),
        IMPLIED,
        names=STACKS,
        treatments=PAIRED,
    ),
    Architecture(
        "olmoe",
        ("olmoe",),
        (*decoder(Rope(IMPLIED), IMPLIED), *experts("num_experts", width=None), _Normed(False), _ATTENTION_BIAS),
        IMPLIED,
        names=STACKS,
    ),
    Architecture(
        "ernie4_5-moe",
        ("ernie4_5_moe",),
        (
            *decoder(),
            *experts("moe_num_experts", "moe_k"),
            Key("moe_num_shared_experts", "expert_shared_count", least=0, default=0),
            Only("interleave_moe_layer_step", (1,), 1),
            Always("moe_layer_interval", 1),
            Key("moe_layer_start_index", "leading_dense_block_count", least=0, default=0, most=MOST),
            Derived("moe_layer_end_index", lambda facts, values: values["num_hidden_layers"] - 1, _last_layer),
            Always("use_bias", False),
            _SOFTMAX,
            _PLAIN_WEIGHTS,
        ),
        HEAD,
        names=STACKS,
        written=lambda config: {
            "expert_shared_feed_forward_length": config.moe_intermediate_size * config.moe_num_shared_experts
        },
        harmless=frozenset({"expert_shared_feed_forward_length"}),
    ),
    Architecture(
        "minimax-m2",
        ("minimax_m2",),
        (
            *trunk(feed_forward=None),
            *HEADS,
            HEAD,
            Rope(partial=True),
            *experts("num_local_experts", width="intermediate_size"),
            _SIGMOID,
            _NORMED,
            _PLAIN_WEIGHTS,
        ),
        HEAD,
        names=STACKS,
        written=lambda config: {"feed_forward_length": config.intermediate_size},
        harmless=frozenset({"feed_forward_length"}),
    ),
)
