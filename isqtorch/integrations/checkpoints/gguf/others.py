"""Encoders, state space models and hybrids."""

from __future__ import annotations

from typing import Any

from .common import BLOCKS, MAMBA, STATES, Blocks, trunk
from .facts import MOST, Facts
from .parts import Derived, Key, Only, Part, Present, Values
from .record import Architecture, Names


def _is_umt5(facts: Facts) -> bool:
    return "enc.blk.1.attn_rel_b.weight" in facts.shapes


class _Gated(Part):
    """T5 1.0 has a plain MLP, later ones have a gate."""

    def read(self, facts: Facts, values: Values) -> None:
        values["feed_forward_proj"] = "gated-gelu" if "enc.blk.0.ffn_gate.weight" in facts.shapes else "relu"

    def write(self, config: Any, keys: Values) -> None:
        if config.feed_forward_proj not in ("gated-gelu", "relu"):
            raise ValueError(
                f"feed_forward_proj is {config.feed_forward_proj!r}, and a file can only say gated-gelu or relu"
            )


_T5 = (
    *trunk()[:1],
    Key("n_positions", "context_length", default=512, most=MOST),
    Blocks("num_layers"),
    Derived(
        "num_decoder_layers",
        lambda facts, values: facts.integer("decoder_block_count", values["num_layers"], most=facts.blocks),
    ),
    Key("d_model", "embedding_length"),
    Key("d_ff", "feed_forward_length"),
    Key("num_heads", "attention.head_count"),
    Key("d_kv", "attention.key_length"),
    Key("relative_attention_num_buckets", "attention.relative_buckets_count"),
    Key("layer_norm_epsilon", "attention.layer_norm_epsilon", "number", 1e-6),
    Key("decoder_start_token_id", "decoder_start_token_id", default=0, least=0, most=MOST),
    _Gated(),
)


def _t5_keys(config: Any) -> Values:
    return {
        "decoder_block_count": config.num_decoder_layers,
        "attention.head_count_kv": config.num_heads,
        "attention.value_length": config.d_kv,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
    }


_T5_EXTRAS = frozenset({"attention.head_count_kv", "attention.value_length", "attention.layer_norm_rms_epsilon"})
_T5_NAMES = (Names(r"(?:encoder|decoder)\.embed_tokens\.weight", (("token_embd.weight",),)),)


class _Mamba(Part):
    """The sizes of Mamba 1."""

    def read(self, facts: Facts, values: Values) -> None:
        inner = facts.integer("ssm.inner_size", least=1)
        if inner % values["hidden_size"]:
            raise facts.wrong("ssm.inner_size", inner, f"a multiple of the width {values['hidden_size']}")
        values |= {"expand": inner // values["hidden_size"], "intermediate_size": inner}

    def write(self, config: Any, keys: Values) -> None:
        keys["ssm.inner_size"] = config.intermediate_size


_MAMBA = (
    *trunk()[:1],
    BLOCKS,
    Key("hidden_size", "embedding_length"),
    Key("layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "number"),
    Key("conv_kernel", "ssm.conv_kernel"),
    Key("state_size", "ssm.state_size"),
    Key("time_step_rank", "ssm.time_step_rank"),
    _Mamba(),
    Present("use_bias", "blk.0.ssm_in.bias"),
    Present("use_conv_bias", "blk.0.ssm_conv1d.bias"),
)


def _mamba_keys(config: Any) -> Values:
    return {"context_length": 1 << 20, "feed_forward_length": 0, "attention.head_count": 0}


_MAMBA_EXTRAS = frozenset({"context_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"})

RECORDS = (
    Architecture(
        "t5",
        ("umt5",),
        _T5,
        names=_T5_NAMES,
        when=_is_umt5,
        model="UMT5ForConditionalGeneration",
        written=_t5_keys,
        harmless=_T5_EXTRAS,
    ),
    Architecture(
        "t5", ("t5",), _T5, names=_T5_NAMES, model="T5ForConditionalGeneration", written=_t5_keys, harmless=_T5_EXTRAS
    ),
    Architecture("t5encoder", (), _T5, names=_T5_NAMES, when=_is_umt5, reads_as="umt5", model="UMT5EncoderModel"),
    Architecture("t5encoder", (), _T5, names=_T5_NAMES, reads_as="t5", model="T5EncoderModel", harmless=_T5_EXTRAS),
    Architecture(
        "mamba",
        ("mamba",),
        (*_MAMBA, Only("ssm.dt_b_c_rms", (False, 0))),
        names=STATES,
        treatments=MAMBA,
        when=lambda facts: not facts.flag("ssm.dt_b_c_rms", False),
        harmless=_MAMBA_EXTRAS,
        written=_mamba_keys,
    ),
    Architecture(
        "mamba",
        ("falcon_mamba",),
        (*_MAMBA, Only("ssm.dt_b_c_rms", (True, 1), True)),
        names=STATES,
        treatments=MAMBA,
        harmless=_MAMBA_EXTRAS,
        written=_mamba_keys,
    ),
)
