"""What importance and the search rule buy on trained weights: the demo model, calibrated on its training text, judged on other text."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isqtorch

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parent.parent / "examples/demo_model"
CONTEXT = 256  # as in training
TOKENS = 40 * CONTEXT


@cache
def demo() -> tuple[Any, Any, Tensor, Tensor]:
    """The model in f32 (so that rounding activations hides nothing), tokenizer, held-out ids, its logits on them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[: 8 * TOKENS]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:TOKENS])
    assert len(ids) == TOKENS
    return model, tokenizer, ids, isqtorch.reference_logits(model, ids, context=CONTEXT)


@cache
def calibrated() -> isqtorch.Imatrix:
    model, tokenizer, *_ = demo()
    return isqtorch.collect_imatrix(model, DEMO / "calibration.txt", tokenizer, chunk=CONTEXT, progress=False)


@cache
def divergence(fmt: str, weighted: bool, rule: str | None = None) -> float:
    model, _, ids, reference = demo()
    model = copy.deepcopy(model)
    isqtorch.quantize_(model, fmt, imatrix=calibrated() if weighted else None, rule=rule, progress=False)
    return isqtorch.kl_divergence(model, reference, ids, context=CONTEXT).mean


@pytest.mark.parametrize(
    ("fmt", "at_most"),
    [("q2k", 0.9), ("q3k", 0.9), *(pytest.param(fmt, 1.0, marks=pytest.mark.slow) for fmt in ("q4k", "q5k", "q6k"))],
)
def test_importance_lowers_the_divergence(fmt: str, at_most: float) -> None:
    plain, weighted = divergence(fmt, False), divergence(fmt, True)
    print(f"{fmt}: mean KL {plain:.6f} -> {weighted:.6f} ({100 * (weighted / plain - 1):+.1f} %)")
    assert weighted < at_most * plain, (plain, weighted)


@pytest.mark.parametrize(
    ("fmt", "at_most", "weighted_at_most"),
    [
        ("afq2", 0.85, 0.7),
        *(
            pytest.param(fmt, *most, marks=pytest.mark.slow)
            for fmt, *most in (("afq3", 0.92, 0.8), ("afq4", 0.95, 0.9), ("hqq4", 1.0, 0.95))
        ),
    ],
)
def test_the_search_lowers_the_divergence(fmt: str, at_most: float, weighted_at_most: float) -> None:
    """Of formats that have it as a rule, with importance more: without it, q, k, v and down keep the default rule."""
    plain, searched = divergence(fmt, False), divergence(fmt, False, "search")
    weighted = divergence(fmt, True, "search")
    print(f"{fmt}: mean KL {plain:.6f} -> {searched:.6f}, with importance {weighted:.6f}")
    assert searched < at_most * plain and weighted < weighted_at_most * plain, (plain, searched, weighted)


def test_the_calibration_text_is_not_the_held_out_text() -> None:
    held, used = ((DEMO / name).read_text(encoding="utf-8") for name in ("heldout.txt", "calibration.txt"))
    lines = {line for line in held.splitlines() if len(line) > 60}
    assert not [line for line in used.splitlines() if line in lines]
    assert calibrated().tokens > 20_000
