"""Dense decoders: one MLP for each layer."""

from __future__ import annotations

from typing import Any

from .common import HEAD, HEAD_NAME, HEADS, IMPLIED, ONE_IN_NORMS, PAIRED, Blocks, decoder, has_experts, trunk
from .facts import MOST, Facts
from .layout import by_group, by_head
from .parts import Always, Derived, Key, Layers, Only, Part, Present, Values
from .record import Architecture, Names, Treatment
from .rope import LONG, SHORT, Rope

_ATTENTION_BIAS = Present("attention_bias", "blk.0.attn_q.bias")
_MLP_BIAS = Present("mlp_bias", "blk.0.ffn_up.bias")
_PARTIAL = Rope(partial=True)
_PARTIAL_IMPLIED = Rope(IMPLIED, partial=True)
_SECTIONS = frozenset({"rope.dimension_sections", "n_deepstack_layers"})  # of images; those of text are all equal


class _LongRope(Part):
    """The factors of Phi 3 for short and long texts. They are tensors, whose values `config.py` reads."""

    def read(self, facts: Facts, values: Values) -> None:
        original = facts.integer("rope.scaling.original_context_length", values["max_position_embeddings"], 1, MOST)
        values["original_max_position_embeddings"] = original
        if LONG in facts.shapes or SHORT in facts.shapes:
            values["rope_parameters"]["rope_type"] = "longrope"
            values["rope_parameters"]["original_max_position_embeddings"] = original

    def write(self, config: Any, keys: Values) -> None:
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings


class _Window(Part):
    """The sliding window of all layers, which not all models have; 0 in the file means none."""

    def read(self, facts: Facts, values: Values) -> None:
        values["sliding_window"] = facts.integer("attention.sliding_window", 0, most=MOST) or None

    def write(self, config: Any, keys: Values) -> None:
        if config.sliding_window is not None:
            keys["attention.sliding_window"] = config.sliding_window


def _gemma_scalar(largest: int) -> Derived:
    """The scale of attention is not in the file. llama.cpp takes the width of a head, but not for the largest model.

    Args:
        largest: the number of layers of that model, whose scale is the width of the model divided by the heads.
    """

    def of(layers: int, hidden: int, heads: int, head: int) -> int:
        return hidden // heads if layers == largest else head

    return Derived(
        "query_pre_attn_scalar",
        lambda facts, values: of(
            values["num_hidden_layers"], values["hidden_size"], values["num_attention_heads"], values["head_dim"]
        ),
        lambda config: of(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim),
    )


class _Falcon(Part):
    """Falcon 7B has one key for all heads, later ones have groups of heads, and some have two norms for each layer."""

    def read(self, facts: Facts, values: Values) -> None:
        heads = values["num_attention_heads"]
        groups = facts.integer("attention.head_count_kv", 1, least=1)
        if heads % groups:
            raise facts.wrong("attention.head_count_kv", groups, f"a divisor of the {heads} heads")
        both = "blk.0.attn_norm_2.weight" in facts.shapes
        values |= {
            "num_kv_heads": groups,
            "new_decoder_architecture": groups > 1 or both,
            "num_ln_in_parallel_attn": 2 if both else 1,
            "multi_query": True,
            "parallel_attn": True,
            "alibi": False,
            "bias": "blk.0.attn_qkv.bias" in facts.shapes,
        }

    def write(self, config: Any, keys: Values) -> None:
        if config.alibi or not config.parallel_attn or not (config.multi_query or config.new_decoder_architecture):
            raise ValueError(
                "only Falcon models with rotary embeddings, parallel attention and shared keys can be written"
            )
        keys["attention.head_count_kv"] = _falcon_groups(config)


def _falcon_groups(config: Any) -> int:
    return int(config.num_kv_heads) if config.new_decoder_architecture else 1


class _Temperature(Part):
    """Ministral 3 scales its queries by the position, beyond the length that it was trained with."""

    def read(self, facts: Facts, values: Values) -> None:
        beta = facts.number("attention.temperature_scale", None)
        if beta is not None:
            values["rope_parameters"]["llama_4_scaling_beta"] = beta

    def write(self, config: Any, keys: Values) -> None:
        beta = config.rope_parameters.get("llama_4_scaling_beta")
        if beta is not None:
            keys["attention.temperature_scale"] = float(beta)


_GPT2 = (
    Key("n_positions", "context_length"),
    Blocks("n_layer"),
    Key("n_embd", "embedding_length"),
    Derived("n_inner", lambda facts, values: facts.integer("feed_forward_length", 4 * values["n_embd"])),
    Key("n_head", "attention.head_count"),
    Key("layer_norm_epsilon", "attention.layer_norm_epsilon", "number"),
    *trunk()[:1],
)
_GRANITE = (
    Key("attention_multiplier", "attention.scale", "number"),
    Key("embedding_multiplier", "embedding_scale", "number"),
    Key("residual_multiplier", "residual_scale", "number"),
    Key("logits_scaling", "logit_scale", "number"),
)

RECORDS = (
    Architecture(
        "llama",
        ("llama", "mistral"),
        (*decoder(), _ATTENTION_BIAS, _MLP_BIAS),
        HEAD,
        treatments=PAIRED,
        when=lambda facts: not has_experts(facts),
    ),
    Architecture("qwen2", ("qwen2",), decoder(Rope(IMPLIED), IMPLIED), IMPLIED),
    Architecture("qwen3", ("qwen3",), (*decoder(), _ATTENTION_BIAS), HEAD),
    Architecture(
        "qwen2vl",
        (),
        decoder(Rope(IMPLIED), IMPLIED),
        IMPLIED,
        reads_as="qwen2",
        harmless=_SECTIONS,
        note="the file has the text part of a Qwen2-VL model, which is a Qwen2 model",
    ),
    Architecture(
        "qwen3vl",
        (),
        (*decoder(), _ATTENTION_BIAS),
        HEAD,
        reads_as="qwen3",
        harmless=_SECTIONS,
        note="the file has the text part of a Qwen3-VL model, which is a Qwen3 model",
    ),
    Architecture("gemma", ("gemma",), decoder(), HEAD, names=(HEAD_NAME,), treatments=(ONE_IN_NORMS,)),
    Architecture(
        "gemma2",
        ("gemma2",),
        (
            *decoder(),
            Layers(2, key=None, first_full=False),
            Key("attn_logit_softcapping", "attn_logit_softcapping", "number", 50.0),
            Key("final_logit_softcapping", "final_logit_softcapping", "number", 30.0),
            _gemma_scalar(46),
        ),
        HEAD,
        names=(HEAD_NAME,),
        treatments=(ONE_IN_NORMS,),
    ),
    Architecture(
        "gemma3",
        ("gemma3_text",),
        (
            *decoder(Rope(theta=1_000_000.0, local=10_000.0)),
            Layers(6),
            Key("final_logit_softcapping", "final_logit_softcapping", "number", None),
            _gemma_scalar(62),
        ),
        HEAD,
        treatments=(ONE_IN_NORMS,),
    ),
    Architecture(
        "phi3",
        ("phi3",),
        (
            *decoder(_PARTIAL_IMPLIED, IMPLIED),
            _LongRope(),
            _Window(),
        ),
        IMPLIED,
    ),
    Architecture(
        "phi2",
        ("phi",),
        (*decoder(_PARTIAL_IMPLIED, IMPLIED, eps="layer_norm_eps", rms=False), Always("qk_layernorm", False)),
        IMPLIED,
    ),
    Architecture(
        "gpt2",
        ("gpt2",),
        _GPT2,
        written=lambda config: {"feed_forward_length": config.n_inner or 4 * config.n_embd},
    ),
    Architecture(
        "starcoder",
        ("gpt_bigcode",),
        (*_GPT2, Always("multi_query", True), Only("attention.head_count_kv", (1,), 1)),
        written=lambda config: {"feed_forward_length": config.n_inner or 4 * config.n_embd},
    ),
    Architecture(
        "starcoder2",
        ("starcoder2",),
        (
            *decoder(Rope(IMPLIED), IMPLIED, eps="norm_epsilon", rms=False),
            Present("use_bias", "blk.0.attn_q.bias"),
            _Window(),
        ),
        IMPLIED,
    ),
    Architecture(
        "falcon",
        ("falcon",),
        (
            *trunk(eps="layer_norm_epsilon", rms=False, feed_forward="ffn_hidden_size"),
            Key("num_attention_heads", "attention.head_count"),
            _Falcon(),
            IMPLIED,
            Rope(IMPLIED),
            Only("tensor_data_layout", ("jploski",), "jploski"),
        ),
        IMPLIED,
        treatments=(
            Treatment(
                r"query_key_value\.\w+",
                rows=lambda config: by_group(config.num_attention_heads, _falcon_groups(config)),
            ),
        ),
    ),
    Architecture(
        "bloom",
        ("bloom",),
        (
            *trunk()[:1],
            Blocks("n_layer"),
            Key("hidden_size", "embedding_length"),
            Key("n_head", "attention.head_count"),
            Key("layer_norm_epsilon", "attention.layer_norm_epsilon", "number"),
        ),
        treatments=(Treatment(r"query_key_value\.\w+", rows=lambda config: by_head(config.n_head)),),
        harmless=frozenset({"feed_forward_length"}),  # always four times the width
        written=lambda config: {
            "context_length": getattr(config, "seq_length", 2048),
            "feed_forward_length": 4 * config.hidden_size,
        },
    ),
    Architecture(
        "stablelm",
        ("stablelm",),
        (
            *decoder(_PARTIAL_IMPLIED, IMPLIED, eps="layer_norm_eps", rms=False),
            Present("use_qkv_bias", "blk.0.attn_q.bias"),
            Present("use_parallel_residual", "blk.0.ffn_norm.weight", if_there=False, if_not=True),
            Present("qk_layernorm", "blk.0.attn_q_norm.weight"),
        ),
        IMPLIED,
        names=(
            Names(
                r"layers\.(\d+)\.self_attn\.q_layernorm\.norms\.(\d+)\.weight",
                (("blk.{}.attn_q_norm.weight",),),
                part=True,
            ),
            Names(
                r"layers\.(\d+)\.self_attn\.k_layernorm\.norms\.(\d+)\.weight",
                (("blk.{}.attn_k_norm.weight",),),
                part=True,
            ),
        ),
        written=lambda config: {"use_parallel_residual": bool(config.use_parallel_residual)},
    ),
    Architecture(
        "nemotron",
        ("nemotron",),
        (*decoder(_PARTIAL, eps="norm_eps", rms=False), _ATTENTION_BIAS, _MLP_BIAS),
        HEAD,
        treatments=(ONE_IN_NORMS,),
    ),
    Architecture(
        "granite",
        ("granite",),
        (*decoder(Rope(IMPLIED), IMPLIED), *_GRANITE, _ATTENTION_BIAS, _MLP_BIAS),
        IMPLIED,
        treatments=PAIRED,
    ),
    Architecture(
        "smollm3",
        ("smollm3",),
        (*decoder(Rope(IMPLIED), IMPLIED), _ATTENTION_BIAS, _MLP_BIAS, Always("no_rope_layer_interval", 4)),
        IMPLIED,
        treatments=PAIRED,
    ),
    Architecture(
        "arcee",
        ("arcee",),
        (*decoder(), _ATTENTION_BIAS, _MLP_BIAS),
        HEAD,
        treatments=PAIRED,
    ),
    Architecture(
        "mistral3",
        ("ministral3",),
        (*decoder(Rope(always={"mscale": 1.0, "mscale_all_dim": 1.0})), _Temperature()),
        HEAD,
        treatments=PAIRED,
        written=lambda config: {"rope.scaling.yarn_log_multiplier": 1.0},
        harmless=frozenset({"rope.scaling.yarn_log_multiplier"}),
    ),
    Architecture("hunyuan-dense", ("hunyuan_v1_dense",), (*decoder(), _ATTENTION_BIAS), HEAD),
    Architecture("seed_oss", ("seed_oss",), (*decoder(), _ATTENTION_BIAS), HEAD),
    Architecture("ernie4_5", ("ernie4_5",), (*decoder(), Always("use_bias", False)), HEAD),
    Architecture(
        "olmo",
        ("olmo",),
        (
            *trunk(eps="", rms=False),
            *HEADS,
            IMPLIED,
            Rope(IMPLIED),
            Key("clip_qkv", "attention.clamp_kqv", "number", None),
            _ATTENTION_BIAS,
        ),
        IMPLIED,
        treatments=PAIRED,
        written=lambda config: {"attention.layer_norm_epsilon": 1e-5},  # which the model class has in its code
        harmless=frozenset({"attention.layer_norm_epsilon"}),
    ),
    Architecture("olmo2", ("olmo2",), (*decoder(Rope(IMPLIED), IMPLIED), _ATTENTION_BIAS), IMPLIED),
    Architecture(
        "command-r",
        ("cohere",),
        (
            *decoder(Rope(IMPLIED), IMPLIED, eps="layer_norm_eps", rms=False),
            Key("logit_scale", "logit_scale", "number"),
            Present("use_qk_norm", "blk.0.attn_q_norm.weight"),
            _ATTENTION_BIAS,
        ),
        IMPLIED,
        names=(HEAD_NAME,),
    ),
    Architecture(
        "cohere2",
        ("cohere2",),
        (
            *decoder(eps="layer_norm_eps", rms=False),
            Layers(4, key="attention.sliding_window_pattern"),
            Key("logit_scale", "logit_scale", "number"),
            _ATTENTION_BIAS,
        ),
        HEAD,
        names=(HEAD_NAME,),
    ),
    Architecture("glm4", ("glm4",), (*decoder(_PARTIAL), _ATTENTION_BIAS), HEAD),
    Architecture("chatglm", ("glm",), (*decoder(_PARTIAL), _ATTENTION_BIAS), HEAD),
    Architecture(
        "gptneox",
        ("gpt_neox",),
        (
            *decoder(_PARTIAL_IMPLIED, IMPLIED, eps="layer_norm_eps", rms=False),
            Key("use_parallel_residual", "use_parallel_residual", "flag", True),
        ),
        IMPLIED,
        treatments=(Treatment(r"query_key_value\.\w+", rows=lambda config: by_head(config.num_attention_heads)),),
    ),
)
