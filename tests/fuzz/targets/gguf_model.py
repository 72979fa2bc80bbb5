"""GGUF files of models: architecture, configuration, tokenizer and settings. No model is built.

Some changes keep the container valid: keys without a value, of another type, or with an absurd number. Others change
bytes, as for importance matrices.
"""

from __future__ import annotations

import logging
import warnings
from random import Random
from typing import Any

from gguf_files import encode, f32
from test_imatrix_fuzz import mutate as mutate_bytes
from transformers import AutoConfig

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.integrations.checkpoints.gguf.architectures import ARCHITECTURES
from isqtorch.integrations.checkpoints.gguf.checkpoint import GgufCheckpoint

SIZES = {
    "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "d_model": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 8, "head_dim": 2, "sliding_window": 4, "num_experts": 4, "d_ff": 8, "d_kv": 2,
    "num_local_experts": 4, "state_size": 2, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4, "num_layers": 2,
    "num_experts_per_tok": 2, "time_step_rank": 2, "num_heads": 2, "relative_attention_num_buckets": 8, "n_layer": 2, "n_head": 2,
    "n_embd": 4, "query_pre_attn_scalar": 2, "norm_topk_prob": True, "tie_word_embeddings": True, "use_bias": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "feed_forward_proj": "relu",
}  # fmt: skip


def seeds() -> dict[str, dict[str, Any]]:
    """Name of an architecture -> the keys of a tiny file."""
    logging.disable(logging.ERROR)  # about sizes that no real model has
    found: dict[str, dict[str, Any]] = {"clip": {}, "unknown": {"block_count": 2}}
    for record in ARCHITECTURES:
        for kind in record.model_types:
            options = SIZES | ({"norm_topk_prob": False} if record.name in ("qwen2moe", "olmoe") else {})
            options = {name: value for name, value in options.items() if (kind, name) != ("falcon", "head_dim")}
            options |= {"layer_types": ["conv", "full_attention"]} if kind == "lfm2_moe" else {}
            try:
                found[record.name] = record.keys(AutoConfig.for_model(kind, **options))
            except ValueError:  # a config that a file cannot state
                continue
    logging.disable(logging.NOTSET)
    return found


SEEDS = seeds()
TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "</s>", "<|im_end|>", "c", "d"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 3, 3, 4, 6],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, 0.0, 0.0, 0.0, 1.0, 2.0],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.chat_template": "{{ messages }}",
}
TENSORS = {
    "token_embd.weight": f32([[0.5] * 4] * 8),
    "blk.0.attn_q.weight": f32([[0.5] * 4] * 4),
    "blk.1.ffn_up.weight": f32([[0.5] * 4] * 8),
    "enc.blk.0.attn_q.weight": f32([[0.5] * 4] * 4),
    "enc.blk.1.attn_q.weight": f32([[0.5] * 4] * 4),
    "position_embd.weight": f32([[0.5] * 4] * 8),
    "rope_freqs.weight": f32([1.0, 2.0]),
}
LEAVES = tuple(leaf for leaf in mutate.LEAVES if leaf is not None and not isinstance(leaf, dict))


def plain(item: Any) -> Any:
    """What the writer can write of a changed value."""
    if isinstance(item, bool) or (isinstance(item, int) and -(2**31) <= item < 2**32):
        return item
    if isinstance(item, float):
        return item if abs(item) < 3e38 or item != item else 1e38
    if isinstance(item, str):
        return item.encode("utf-8", "replace").decode()
    if isinstance(item, list) and item:
        first = plain(item[0])
        same = [each for each in map(plain, item) if type(each) is type(first)]
        return first if isinstance(first, list) else same
    return 0


def make(rng: Random) -> bytes:
    name = rng.choice(list(SEEDS))
    meta: dict[str, Any] = {"general.architecture": name, **TOKENS}
    meta |= {f"{name}.{key}": value for key, value in SEEDS[name].items()}
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        key = rng.choice(list(meta))
        kind = rng.randrange(3)
        if kind == 0:
            del meta[key]
        else:
            meta[key] = rng.choice(LEAVES) if kind == 1 else mutate.tree(rng, meta[key], LEAVES)
    tensors = dict(TENSORS)
    if rng.random() < 0.95:
        del tensors["rope_freqs.weight"]
    data = encode({key: plain(value) for key, value in meta.items()}, tensors)
    return data if rng.random() < 0.7 else b"GGUF" + mutate_bytes(data, rng)[4:]


def run(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = GgufCheckpoint(mutate.written(data, "x.gguf"))
        checkpoint.generation()
        try:
            checkpoint.tokenizer()
        finally:
            checkpoint.config()


TARGET = Target(make, run)
