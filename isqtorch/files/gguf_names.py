"""Map module paths of transformers models to GGUF tensor names.

An importance matrix made by llama.cpp uses GGUF names. Its numbers belong to the *input columns* of a matrix, and
matrices with the same input (q, k and v; gate and up) have the same numbers. A layer that GGUF fuses or splits
differently can therefore use the entry of any of them. Names follow the tables of the `gguf` package.
"""

from __future__ import annotations

import re

_Table = dict[str, tuple[str, ...]]  # last part of a module path -> stems of GGUF names, best first


def _table(rows: dict[str, str]) -> _Table:
    """{"module names": "gguf stems"} -> one entry per module name."""
    return {name: tuple(stems.split()) for names, stems in rows.items() for name in names.split()}


_ATTENTION = _table(
    {
        "q_proj query wq q_lin": "attn_q attn_qkv",
        "k_proj key wk k_lin": "attn_k attn_qkv",
        "v_proj value wv v_lin": "attn_v attn_qkv",
        "qkv_proj query_key_value c_attn Wqkv": "attn_qkv attn_q attn_k attn_v",
        "o_proj out_proj dense c_proj wo Wo out_lin": "attn_output",
        "q_a_proj wq_a": "attn_q_a",
        "q_b_proj wq_b": "attn_q_b",
        "kv_a_proj_with_mqa wkv_a_with_mqa": "attn_kv_a_mqa",
        "kv_b_proj": "attn_kv_b",
        "gate_proj": "attn_gate",
    }
)
_MLP = _table(
    {
        "gate_proj w1": "ffn_gate ffn_up",
        "up_proj w3": "ffn_up ffn_gate",
        "gate_up_proj": "ffn_up ffn_gate",
        "c_fc fc1 fc_in dense_h_to_4h lin1 Wi": "ffn_up",
        "down_proj w2 c_proj fc2 fc_out dense_4h_to_h lin2 Wo": "ffn_down",
    }
)
_EXPERTS = _table(
    {
        "gate_proj w1": "ffn_gate_exps ffn_gate_up_exps",
        "up_proj w3": "ffn_up_exps ffn_gate_up_exps",
        "gate_up_proj": "ffn_gate_up_exps ffn_gate_exps ffn_up_exps",
        "down_proj w2": "ffn_down_exps",
    }
)
_SHARED_EXPERT = _table(
    {
        "gate_proj w1": "ffn_gate_shexp ffn_up_shexp",
        "up_proj w3": "ffn_up_shexp ffn_gate_shexp",
        "gate_up_proj input_linear": "ffn_gate_shexp ffn_up_shexp",
        "down_proj w2 output_linear": "ffn_down_shexp",
    }
)
_STATE_SPACE = _table({"in_proj": "ssm_in", "x_proj": "ssm_x", "dt_proj": "ssm_dt", "out_proj": "ssm_out"})
# linear_attn.out_proj is left out on purpose: GGUF reorders the heads of some of these models, and so the columns of
# this matrix. Its numbers would be applied to the wrong columns.
_LINEAR_ATTENTION = _table(
    {
        "in_proj_qkvz": "ssm_in",
        "in_proj_ba": "ssm_ba",
        "in_proj_qkv": "attn_qkv",
        "in_proj_z": "attn_gate",
        "in_proj_b": "ssm_beta",
        "in_proj_a": "ssm_alpha",
    }
)
_SHORT_CONVOLUTION = _table({"in_proj": "shortconv.in_proj", "out_proj": "shortconv.out_proj"})

# Pattern of the path between the block number and the last name, and the table for the last name.
_PLACES: tuple[tuple[re.Pattern[str], _Table], ...] = tuple(
    (re.compile(pattern), table)
    for pattern, table in (
        (r"(norm_attn_norm\.)?(self_attn|self_attention|attn|attention)(\.self|\.attention)?", _ATTENTION),
        (r"mlp|feed_forward|ffn", _MLP),
        (r"((mlp|feed_forward|block_sparse_moe|moe|mixer)\.)?experts(\.(?P<expert>\d+))?", _EXPERTS),
        (r"((mlp|feed_forward|block_sparse_moe|mixer)\.)?(shared_experts?|share_expert|shared_mlp)", _SHARED_EXPERT),
        (r"mamba", _STATE_SPACE),
        (r"mixer", _STATE_SPACE | _ATTENTION | _MLP | {"out_proj": ("ssm_out",)}),  # the blocks of hybrid models
        (r"linear_attn", _LINEAR_ATTENTION),
        (r"conv", _SHORT_CONVOLUTION),
        (r"", _table({"fc1": "ffn_up", "fc2": "ffn_down"})),  # OPT
        (r"attention\.output", _table({"dense": "attn_output"})),  # BERT, and the next two
        (r"intermediate", _table({"dense": "ffn_up"})),
        (r"output", _table({"dense": "ffn_down"})),
    )
)

# The only names allowed before the blocks. A vision or audio tower also numbers its blocks from 0 and must not match.
_PREFIX = (
    r"(?:(?:model|base_model|language_model|text_model|llm|transformer|decoder|backbone|bert|roberta|distilbert|encoder"
    r"|gpt_neox|embeddings|embd|module|_orig_mod)\.)*"
)
_BLOCK = re.compile(_PREFIX + r"(?:layers|layer|h|blocks)\.(\d+)\.(?:(.+)\.)?(\w+)")
_EMBEDDING = re.compile(_PREFIX + r"(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)")
_HEAD = re.compile(_PREFIX + r"(?:lm_head|embed_out|output_layer|output)")


def names_to_write(layer: str) -> tuple[list[str], int | None]:
    """Return the GGUF names under which to store a layer's importance, and the number of the expert (see `gguf_names`).

    There is one name (none for an unknown layer), except for fused gate and up experts: most GGUF files keep these
    apart, so all three names are used.
    """
    names, expert = gguf_names(layer)
    fused = layer.removesuffix(".weight").endswith(".gate_up_proj") and names[:1] != [] and "_exps" in names[0]
    return (names if fused else names[:1]), expert


def gguf_names(layer: str) -> tuple[list[str], int | None]:
    """Return the GGUF names under which a layer's importance may be found.

    Args:
        layer: module path of the layer, such as "model.layers.0.self_attn.q_proj".

    Returns:
        The names, best first; empty for an unknown layer. Then the number of the expert, if the layer is one of a list
        of experts that GGUF stores as one tensor, else None.
    """
    layer = layer.removesuffix(".weight")
    if _EMBEDDING.fullmatch(layer):
        return ["token_embd.weight"], None
    if _HEAD.fullmatch(layer):
        return ["output.weight", "token_embd.weight"], None  # the second one is for a file with a tied matrix
    block = _BLOCK.fullmatch(layer)
    if block is None:
        return [], None
    number, place, leaf = int(block[1]), block[2] or "", block[3]
    for pattern, table in _PLACES:
        match = pattern.fullmatch(place)
        if match and leaf in table:
            expert = match.groupdict().get("expert")
            return [f"blk.{number}.{stem}.weight" for stem in table[leaf]], int(expert) if expert else None
    return [], None
