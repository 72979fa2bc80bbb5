"""Checkpoints: real shapes with made-up weights, and small real models. Written once, in seconds, the same on every machine.

The numbers of every matrix are one block of normally distributed ones again and again, scaled: a quantizer and a product take as
long for them as for trained ones. The length of the block is prime, so that no two rows of a matrix are alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quality import packages

BLOCK = 1_000_003  # numbers before they repeat; prime
SCALE = 0.02  # of the weights, as transformers initializes them

_LLAMA = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
_MOE = {
    "vocab_size": 32_768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_SMALL = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "moe": ("qwen3_moe", _MOE),
    "llama-small": ("llama", {**_LLAMA, **_SMALL, "intermediate_size": 1024, "num_key_value_heads": 2}),
    "moe-small": ("qwen3_moe", {**_MOE, **_SMALL, "moe_intermediate_size": 256, "num_experts": 16}),
}
"""Llama-3.2-1B, 2.5 GB in bf16; Qwen3-30B-A3B's layers with 64 of their 128 experts, three of them and fewer words, 2.0 GB; and
small ones of both kinds, to see that everything runs. The first word of a name is what the tables call it."""


REAL = ("smollm2",)
"""Models of `quality/packages.py`: a GGUF file with a tokenizer. Here they are folders of bf16."""


def config(name: str) -> Any:
    """The configuration of one of `SHAPES`, of transformers."""
    from transformers import AutoConfig

    family, values = SHAPES[name]
    return AutoConfig.for_model(family, **values, dtype="bfloat16")


def original(name: str) -> Path | None:
    """The GGUF file of one of `REAL`, downloaded if it is not there; None for `SHAPES`."""
    return packages.find(name) if name in REAL else None


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of one of `SHAPES` or `REAL` in `cache`, written if it is not there; another definition is another folder."""
    file = original(name)
    if file is None:
        digest = hashlib.sha256(json.dumps([*SHAPES[name], BLOCK, SCALE], sort_keys=True).encode()).hexdigest()
    else:
        digest = packages.sha256(file)
    folder = cache / f"{name}-{digest[:8]}"
    if not folder.is_dir():
        partial = cache / f"{folder.name}.{os.getpid()}.partial"
        try:
            if file is None:
                write(config(name), partial)
            else:
                decode(file, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def decode(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, all weights in bf16."""
    import isqtorch

    loaded = isqtorch.load(str(file), dtype="bfloat16", progress=False)
    isqtorch.dequantize_(loaded.model)
    loaded.model.save_pretrained(folder)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)


def write(config: Any, folder: Path | str, shard_size: str = "1GB") -> int:
    """Write a causal language model with made-up weights in bf16, the model in memory once; returns its bytes.

    Args:
        config: of transformers.
        folder: where; files of at most `shard_size`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for index, parameter in enumerate(model.parameters()):
        parameter.data = torch.ones_like(parameter) if parameter.dim() == 1 else matrix(parameter.shape, index)
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return sum(parameter.nbytes for parameter in model.parameters())


def matrix(shape: torch.Size | tuple[int, ...], index: int = 0) -> Tensor:
    """A made-up weight in bf16; `index` chooses where in the block it begins, and its scale."""
    count = math.prod(shape)
    spread = SCALE * (0.8 + 0.4 * (index * 0.618 % 1))
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).roll(-7919 * index).mul_(spread).bfloat16()
    values = torch.empty(count, dtype=torch.bfloat16)
    whole = count // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).copy_(block)
    values[whole:].copy_(block[: count - whole])
    return values.view(shape)
