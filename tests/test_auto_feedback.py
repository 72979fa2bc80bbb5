"""quantize_(model, "auto", rule="feedback"): what its costs are measured with."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama

import isqtorch
from isqtorch.auto import sensitivity
from isqtorch.formats import get_format
from isqtorch.importance.feedback import Shelf


def test_a_sample_of_rows_stands_for_all_with_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = tiny_llama(dtype=torch.float32), "model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(1, 500, (16, 32), generator=generator)
    moments = isqtorch.collect_moments(model, windows, progress=False)
    weight = model.get_submodule(name).weight.detach()
    shelf = Shelf(moments)
    layer = shelf.layer([name], tuple(weight.shape))
    assert layer is not None and weight.shape == (512, 256)
    weighing = sensitivity.Weighing(torch.rand(512, generator=generator).double() ** 4, torch.ones(256).double())

    def found() -> sensitivity.Error:
        shelved = sensitivity.ShelvedMoments(shelf, layer)
        sums = sensitivity.measure_errors(
            weight, [get_format("q4_0")], weighing, moments[name], None, {}, moments=shelved
        )
        return sensitivity.errors_of([sums])["q4_0"]

    whole = found()
    monkeypatch.setattr(sensitivity, "_FED_SAMPLE", 128 * 256)
    part = found()
    assert part != whole and whole.cost is not None
    assert part.cost == pytest.approx(whole.cost, rel=0.1)
    assert part.output == pytest.approx(whole.output, rel=0.1)
