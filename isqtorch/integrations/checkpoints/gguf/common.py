"""Parts, names and treatments that many architectures share."""

from __future__ import annotations

from typing import Any

from .facts import MOST, Facts
from .layout import COLUMN, MINUS_EXP, ONE_ADDED, SQUEEZED, half_pairs
from .parts import HeadDim, Key, Part, Values
from .record import Names, RowsOf, Treatment
from .rope import Rope


class _Vocabulary(Part):
    """The number of tokens: the rows of the embedding, which is what the model is built with."""

    def read(self, facts: Facts, values: Values) -> None:
        shape = facts.shape("token_embd.weight")
        if len(shape) != 2:
            raise facts.error(
                f"token_embd.weight has shape {list(shape)}, must have two dimensions. The file is damaged."
            )
        values["vocab_size"] = shape[0]
        facts.value("vocab_size", None)  # may be smaller: rows without a token are padding

    def write(self, config: Any, keys: Values) -> None:
        keys["vocab_size"] = config.vocab_size


class Blocks(Part):
    """The number of blocks, which cannot be more than the tensors belong to.

    Attributes:
        attribute: its name in the config.
    """

    def __init__(self, attribute: str = "num_hidden_layers") -> None:
        self.attribute = attribute

    def read(self, facts: Facts, values: Values) -> None:
        count = facts.integer("block_count", least=1, most=facts.blocks)
        values[self.attribute] = count - facts.integer("nextn_predict_layers", 0, most=count - 1)

    def write(self, config: Any, keys: Values) -> None:
        keys["block_count"] = getattr(config, self.attribute)


BLOCKS = Blocks()


def trunk(
    eps: str = "rms_norm_eps", rms: bool = True, feed_forward: str | None = "intermediate_size"
) -> tuple[Part, ...]:
    """The sizes of a decoder.

    Args:
        eps: the attribute with the epsilon of norms; empty: the config has none.
        rms: the norms are RMS norms; else layer norms.
        feed_forward: the attribute with the width of the MLP; None: the file does not state it, or another part reads it.
    """
    return (
        _Vocabulary(),
        Key("max_position_embeddings", "context_length", most=MOST),
        BLOCKS,
        Key("hidden_size", "embedding_length"),
        *((Key(feed_forward, "feed_forward_length"),) if feed_forward else ()),
        *(
            (Key(eps, "attention.layer_norm_rms_epsilon" if rms else "attention.layer_norm_epsilon", "number"),)
            if eps
            else ()
        ),
    )


class KeyValueHeads(Part):
    """The number of heads of keys and values; without a key there are as many as queries."""

    def read(self, facts: Facts, values: Values) -> None:
        heads = values["num_attention_heads"]
        count = facts.integer("attention.head_count_kv", heads, least=1)
        if heads % count:
            raise facts.wrong("attention.head_count_kv", count, f"a divisor of the {heads} heads")
        values["num_key_value_heads"] = count

    def write(self, config: Any, keys: Values) -> None:
        keys["attention.head_count_kv"] = config.num_key_value_heads or config.num_attention_heads


HEADS: tuple[Part, ...] = (Key("num_attention_heads", "attention.head_count"), KeyValueHeads())
HEAD = HeadDim()
IMPLIED = HeadDim(stored=False)


def decoder(rope: Rope | None = None, head: HeadDim = HEAD, **sizes: Any) -> tuple[Part, ...]:
    """A decoder with rotary embeddings; see `trunk` for the sizes."""
    return (*trunk(**sizes), *HEADS, head, rope or Rope(head))


def experts(
    count: str, used: str = "num_experts_per_tok", width: str | None = "moe_intermediate_size"
) -> tuple[Part, ...]:
    """Routed experts.

    Args:
        count: the attribute with their number.
        used: the attribute with the number that each token uses.
        width: the attribute with their width; None: another part reads it.
    """
    return (
        Key(count, "expert_count"),
        Key(used, "expert_used_count"),
        *((Key(width, "expert_feed_forward_length"),) if width else ()),
    )


_BLOCK = r"layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward|mixer)\."
STACKS = (
    Names(
        _BLOCK + r"experts\.gate_up_proj",
        (("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"), ("blk.{}.ffn_gate_up_exps.weight",)),
    ),
    Names(
        _BLOCK + r"experts\.gate_up_proj_bias",
        (("blk.{}.ffn_gate_exps.bias", "blk.{}.ffn_up_exps.bias"), ("blk.{}.ffn_gate_up_exps.bias",)),
    ),
    Names(_BLOCK + r"experts\.up_proj", (("blk.{}.ffn_up_exps.weight",),)),
    Names(_BLOCK + r"experts\.down_proj", (("blk.{}.ffn_down_exps.weight",),)),
    Names(_BLOCK + r"experts\.down_proj_bias", (("blk.{}.ffn_down_exps.bias",),)),
    Names(_BLOCK + r"(?:router|gate)\.weight", (("blk.{}.ffn_gate_inp.weight",),)),
    Names(
        _BLOCK + r"(?:gate\.)?(?:moe_statics\.)?e_score_correction_bias",
        (("blk.{}.exp_probs_b.bias",), ("blk.{}.exp_probs_b",)),
    ),
)
"""Stacks of experts, and their router."""

STATES = (
    Names(r"layers\.(\d+)\.(?:\w+\.)?A_log", (("blk.{}.ssm_a",),)),
    Names(r"layers\.(\d+)\.(?:\w+\.)?D", (("blk.{}.ssm_d",),)),
    Names(r"layers\.(\d+)\.(?:\w+\.)?dt_bias", (("blk.{}.ssm_dt.bias",),)),
)
"""Parameters of state space models that are no weight and no bias."""

HEAD_NAME = Names(r"lm_head\.weight", (("output.weight",),))
"""The output head, where the table of the `gguf` package has none because official models tie it."""

ONE_IN_NORMS = Treatment(r"\w*norm\.weight", changes=(ONE_ADDED,))
"""Norms that multiply by 1 + weight: the file has the sum."""

MAMBA = (
    Treatment(r"(?:\w+\.)?A_log", changes=(MINUS_EXP,)),
    Treatment(r"conv1d\.weight", changes=(SQUEEZED,)),
)
MAMBA2 = (*MAMBA, Treatment(r"(?:\w+\.)?(?:A_log|D)", changes=(COLUMN,)))


def _heads(attribute: str) -> RowsOf:
    return lambda config: half_pairs(getattr(config, attribute) or config.num_attention_heads)


PAIRED = (
    Treatment(r"self_attn\.q_proj\.(?:weight|bias)", rows=_heads("num_attention_heads")),
    Treatment(r"self_attn\.k_proj\.(?:weight|bias)", rows=_heads("num_key_value_heads")),
)
"""q and k whose rotary embedding pairs neighbours in llama.cpp, and halves in transformers."""


def has_experts(facts: Facts) -> bool:
    """Whether the file says that it has experts."""
    return bool(facts.integer("expert_count", 0))
