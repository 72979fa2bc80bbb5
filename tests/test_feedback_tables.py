"""rule="feedback" for the tables of embeddings: those that a head shares have it, with the moments of the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_llama

import isqtorch
from isqtorch.quantizers import feedback_factor


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_has_feedback_where_a_head_shares_it(tied: bool) -> None:
    model = tiny_llama(tied=tied, dtype=torch.float32)
    windows = torch.randint(0, 500, (96, 60), generator=torch.Generator().manual_seed(0))
    moments = isqtorch.collect_moments(model, windows, progress=False)
    weight = model.lm_head.weight.detach().clone()
    report = isqtorch.quantize_(
        model, "afq4", rule="feedback", imatrix=moments, include=["lm_head", "embed"], progress=False
    )
    own = report["model.embed_tokens"].feedback
    assert report["lm_head"].feedback.share == 1 and (own == report["lm_head"].feedback if tied else own is None)
    assert any("1 weights are tables of embeddings, which have no feed" in note for note in report.notes) != tied
    fmt, h = model.lm_head.format, moments.of("lm_head", 256).matrix()
    want = torch.ops.isqtorch.quantize_feedback(weight, fmt, feedback_factor(h), h.diagonal().contiguous(), "search")
    assert torch.equal(model.lm_head.weight.plain, want)
    assert (model.model.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()) == tied


def test_auto_measures_a_shared_table_with_feedback(tmp_path: Path) -> None:
    """Its cost, and in which pass its moments are collected, belong to the name of the head."""
    windows = torch.randint(0, 500, (96, 60), generator=torch.Generator().manual_seed(0))
    costs = {}
    for rule, most in ((None, None), ("feedback", None), ("feedback", "3MB")):
        model = tiny_llama(tied=True, dtype=torch.float32)
        options = {} if most is None else {"max_memory": most}
        report = isqtorch.quantize_(
            model,
            "auto",
            target_bpw=6,
            formats=["q4_0", "q8_0"],
            rule=rule,
            calibration=windows,
            progress=False,
            **options,
        )
        assert report.choice is not None
        costs[rule, most] = {names[0]: found["q4_0"].cost for names, _, found in report.choice.items}[
            "model.embed_tokens"
        ]
    assert costs["feedback", None] < 0.95 * costs[None, None]
    assert costs["feedback", "3MB"] == costs["feedback", None]
