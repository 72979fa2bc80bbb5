"""Quality on trained weights: more bits, less divergence. The demo model is small, so every format must hold up on it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isqtorch
from isqtorch.formats import formats, get_format

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parent.parent / "examples/demo_model"
TOKENS, CONTEXT = 3072, 512


@cache
def float_model() -> tuple[Any, Tensor, Tensor]:
    """The model in f32 (so that rounding activations hides nothing), held-out ids, its logits on them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[: 6 * TOKENS]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:TOKENS])
    assert len(ids) == TOKENS
    return model, ids, isqtorch.reference_logits(model, ids, context=CONTEXT)


@cache
def quantized(fmt: str) -> Any:
    model = copy.deepcopy(float_model()[0])
    isqtorch.quantize_(model, fmt, progress=False)
    return model


@cache
def divergence(fmt: str) -> float:
    _, ids, reference = float_model()
    return isqtorch.kl_divergence(quantized(fmt), reference, ids, context=CONTEXT).mean


def test_divergence_falls_with_every_bit_of_the_k_quants() -> None:
    divergences = {fmt: divergence(fmt) for fmt in ("q8_0", "q6k", "q5k", "q4k", "q3k", "q2k")}
    assert list(divergences.values()) == sorted(divergences.values()), divergences
    assert 0 < divergences["q8_0"] < 5e-4 and divergences["q2k"] < 0.3, divergences


def test_divergence_falls_with_every_bit_of_afq() -> None:
    divergences = {fmt: divergence(fmt) for fmt in ("afq8", "afq6", "afq4", "afq3", "afq2")}
    assert list(divergences.values()) == sorted(divergences.values()), divergences


def test_perplexity_at_four_bits_is_within_three_percent() -> None:
    model, ids, _ = float_model()
    original = isqtorch.perplexity(model, ids, context=CONTEXT)
    assert isqtorch.perplexity(quantized("q4k"), ids, context=CONTEXT) < 1.03 * original


@pytest.mark.parametrize("fmt", [name for name in formats() if get_format(name).weight_error < 0.1])
def test_text_goes_on_alike(fmt: str) -> None:
    """Greedy continuations agree at first, and never fall into garbage."""
    model, ids, _ = float_model()
    prompt = ids[None, :64]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **options)[0, 64:]
    got = quantized(fmt).generate(prompt, **options)[0, 64:]
    assert int(got[0]) == int(want[0])
