"""Tokens per second of an 8B-shaped model with `generate`, in bf16 and quantized: the kernels as a user meets them."""

from __future__ import annotations

import time
from typing import Any

import torch

import isqtorch

LAYERS = 32


def model(device: str, layers: int = LAYERS, **sizes: int) -> Any:
    """Llama-3-8B's shapes, made-up weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        **sizes,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(before)


def tokens_per_second(model: Any, *, prompt: int = 32, new: int = 128, repeats: int = 3) -> float:
    """The fastest of some greedy replies of one sequence, after one that compiles."""
    device = next(model.parameters()).device
    ids = torch.arange(1, prompt + 1, device=device)[None]
    best = 0.0
    for turn in range(repeats + 1):
        began = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        speed = new / (time.perf_counter() - began)  # the tokens are on the CPU by then: generate looks for an end
        best = max(best, speed) if turn else best
    return best


def measure(device: str, formats: list[str], deadline: float, skipped: list[str], **options: Any) -> dict[str, float]:
    """Tokens per second by format, "bf16" among them; a format is a new model, because compiled steps stay with theirs."""
    found: dict[str, float] = {}
    for format in ["bf16", *formats]:
        if time.monotonic() > deadline:
            skipped.append(f"generate {format}: no time left")
            continue
        made = model(device, **options)
        if format != "bf16":
            isqtorch.quantize_(made, format, progress=False)
        isqtorch.optimize_(made)
        found[format] = tokens_per_second(made)
        del made
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found
