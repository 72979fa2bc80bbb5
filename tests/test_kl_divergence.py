"""The KL divergence against loops written by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_evaluation import Bigram, Tokenizer, kl_by_hand, text

from isqtorch.evaluation import kl_divergence, reference_logits


def nearby(model: Bigram, size: float) -> Bigram:
    other = copy.deepcopy(model)
    noise = torch.randn(model.table.shape, generator=torch.Generator().manual_seed(3))
    other.table.data.add_(size * noise)
    return other


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3, 1e-4])
def test_kl_divergence(size: float, stored: bool) -> None:
    """Accurate down to 5e-9, the smallest of these."""
    reference, ids = Bigram(), text(100)
    model = nearby(reference, size)
    want = kl_by_hand(reference, model, ids, 16)
    given = reference_logits(reference, ids, context=16) if stored else reference
    got = kl_divergence(model, given, ids, context=16, batch=2)
    assert got.tokens == len(want) == 6 * 15 + 3
    assert got.mean == pytest.approx(want.mean().item(), rel=1e-6)
    assert got.p99 == pytest.approx(want.quantile(0.99, interpolation="higher").item(), rel=1e-6)
    assert got.max == pytest.approx(want.max().item(), rel=1e-6)
    tops = (reference.table.argmax(-1) == model.table.argmax(-1))[
        [int(t) for i, t in enumerate(ids[:-1]) if (i + 1) % 16]
    ]
    assert got.top1_agreement == pytest.approx(100 * tops.double().mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_of_a_model_with_itself_is_zero(dtype: torch.dtype) -> None:
    model = Bigram(dtype=dtype)
    for reference in (model, reference_logits(model, text(100), context=16)):
        got = kl_divergence(model, reference, text(100), context=16)
        assert (got.mean, got.p99, got.max, got.top1_agreement) == (0, 0, 0, 100)
    assert reference_logits(model, text(100), context=16).dtype == dtype


def test_kl_is_of_the_reference_to_the_model() -> None:
    a, b, ids = Bigram(0), Bigram(1), text(50)
    assert kl_divergence(a, b, ids, context=16).mean == pytest.approx(kl_by_hand(b, a, ids, 16).mean().item(), rel=1e-6)
    assert kl_divergence(a, b, ids, context=16).mean != pytest.approx(
        kl_divergence(b, a, ids, context=16).mean, rel=1e-3
    )


def test_kl_with_masked_tokens() -> None:
    """-inf in both models adds nothing; -inf where the reference has none is an infinite divergence."""
    a, b, ids = Bigram(0), Bigram(1), text(50)
    a.table.data[:, 10] = b.table.data[:, 10] = -math.inf
    got = kl_divergence(b, a, ids, context=16)
    assert 0 < got.mean < math.inf
    b.table.data[:, 9] = -math.inf
    assert kl_divergence(b, a, ids, context=16).mean == math.inf


def test_kl_of_text() -> None:
    a, b = Bigram(0), Bigram(1)
    got = kl_divergence(a, b, "abcdefghij" * 5, Tokenizer(adds_bos=True), context=16)
    assert got.tokens == 50
    assert "KL" in str(got) and "50 tokens" in str(got)
    logits = reference_logits(b, "abcdefghij" * 5, Tokenizer(adds_bos=True), context=16)
    assert kl_divergence(a, logits, "abcdefghij" * 5, Tokenizer(adds_bos=True), context=16) == got
