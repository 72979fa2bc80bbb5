"""Folders of MLX: config.json with settings, and the headers of three tensors for a weight."""

from __future__ import annotations

import json
import struct
from random import Random

import torch
from accelerate import init_empty_weights
from transformers import LlamaForCausalLM

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.integrations.checkpoints.assemble import assemble
from isqtorch.integrations.checkpoints.mlx.checkpoint import MlxCheckpoint

FOUR = {"group_size": 32, "bits": 4, "mode": "affine"}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "tie_word_embeddings": True,
    "quantization": {**FOUR, "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8}, "model.norm": False},
}
MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
LEAVES = (
    *mutate.LEAVES,
    "affine",
    "mxfp4",
    "nvfp4",
    "mxfp8",
    "F32",
    "F16",
    "U8",
    "U32",
    3,
    4,
    5,
    6,
    8,
    16,
    32,
    64,
    128,
)


def _header() -> dict[str, object]:
    """The entries of all tensors, without their places in the file."""
    entries: dict[str, object] = {}
    for path in ("model.embed_tokens", *(f"model.layers.0.{name}" for name in (*MATRICES, "mlp.up_proj"))):
        bits = 8 if path.endswith("up_proj") else 4
        entries[f"{path}.weight"] = {"dtype": "U32", "shape": [32, bits]}
        entries |= {f"{path}.{leaf}": {"dtype": "BF16", "shape": [32, 1]} for leaf in ("scales", "biases")}
    for norm in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        entries[f"{norm}.weight"] = {"dtype": "BF16", "shape": [32]}
    return entries


HEADER = _header()
SIZES = {"U32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}


def make(rng: Random) -> tuple[str, bytes]:
    config = (
        CONFIG if rng.random() < 0.4 else {**CONFIG, "quantization": mutate.tree(rng, CONFIG["quantization"], LEAVES)}
    )
    header = HEADER if rng.random() < 0.4 else mutate.tree(rng, HEADER, LEAVES)
    return json.dumps(config), _file(header)


def _file(header: object) -> bytes:
    """A file whose places fit, as far as types and shapes can be understood, so that the reader of headers accepts it."""
    end = 0
    for entry in header.values() if isinstance(header, dict) else ():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        size = SIZES.get(str(entry.get("dtype")), 1) if isinstance(entry, dict) else 1
        for length in shape if isinstance(shape, list) else ():
            size *= length if type(length) is int and 0 <= length < 1000 else 1
        if isinstance(entry, dict) and size < 1 << 16:
            entry["data_offsets"] = [end, end + size]
            end += size
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(end)


def run(source: tuple[str, bytes]) -> None:
    mutate.written(source[1], "model.safetensors")
    mutate.written(source[0], "config.json")
    checkpoint = MlxCheckpoint(mutate.folder())
    checkpoint.generation()
    with init_empty_weights():
        model = LlamaForCausalLM(checkpoint.config())
    assemble(model, checkpoint, None, torch.device("cpu"))
    model(torch.zeros(1, 2, dtype=torch.int64))


TARGET = Target(make, run)
