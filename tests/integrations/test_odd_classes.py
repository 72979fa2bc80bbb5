"""Classes of transformers that do what others do not: no float parameter, a from_pretrained of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sweep.building import build
from sweep.checks import first_difference
from transformers import AutoModel, AutoModelForCausalLM

import isqtorch
from isqtorch.integrations.transformers.findings import loaded


def test_a_model_of_packed_weights_only_has_a_type_and_is_saved(tmp_path: Path) -> None:
    model = build("olmo").model.bfloat16()
    isqtorch.quantize_(model, "q4k")
    assert not any(parameter.is_floating_point() for parameter in model.parameters())
    assert model.dtype == model.model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and not first_difference(again, model)


def test_a_model_without_any_weight_has_no_type() -> None:
    model = build("llama").model
    for name, _ in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(path), leaf)
    with pytest.raises(StopIteration):
        _ = model.dtype


@pytest.mark.parametrize("fmt", ["q8_0", None])
def test_a_class_with_a_from_pretrained_of_its_own_is_loaded(fmt: str | None, tmp_path: Path) -> None:
    model = build("jev").model
    model.save_pretrained(tmp_path)
    found = isqtorch.load(tmp_path, fmt, progress=False)
    assert type(found.model) is type(model) and bool(found.report.quantized) == (fmt is not None)
    assert found.model.decision_config is not None  # what its own from_pretrained adds


def test_findings_are_those_of_the_model_that_is_returned(tmp_path: Path) -> None:
    build("llama").model.model.save_pretrained(tmp_path / "trunk")
    build("llama").model.save_pretrained(tmp_path / "whole")

    def load() -> object:
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "trunk")
        AutoModel.from_pretrained(tmp_path / "whole")
        return whole

    model, info = loaded(load)
    assert type(model).__name__ == "LlamaForCausalLM" and list(info["missing_keys"]) == ["lm_head.weight"]
    _, inner = loaded(lambda: loaded(lambda: AutoModel.from_pretrained(tmp_path / "whole"))[0])
    assert list(inner["unexpected_keys"]) == ["lm_head.weight"]
    with pytest.raises(ValueError, match="LlamaModel reads its files in a way of its own"):
        loaded(lambda: build("llama").model.model)
