"""Checkpoints of a real layer's shape and any number of layers, written with little memory."""

from __future__ import annotations

from pathlib import Path

from benchmarks.models.checkpoints import write


def write_llama(folder: Path | str, layers: int, shard_size: str = "600MB") -> int:
    """bf16, hidden 2048, 67 M weights per layer, 8192 words; returns its bytes. 15 layers are 2.1 GB."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return write(config, folder, shard_size)


def write_moe(folder: Path | str, layers: int, experts: int = 24) -> int:
    """A Qwen3-MoE in bf16 with experts of 1.6 M weights in three matrices; returns its bytes. Two layers are 160 MB."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        dtype="bfloat16",
    )
    return write(config, folder)
