"""Merging adapters into packed layers without their float weights: what is lost is said, and more bits keep it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import state_bytes
from torch import Tensor, nn

from isqtorch.inplace.quantize import quantize_

peft = pytest.importorskip("peft", "0.21")

from adapters import silent, tuned, warned  # noqa: E402

from isqtorch.integrations.peft import merging  # noqa: E402

pytestmark = pytest.mark.usefixtures("enabled")


def small(fmt: str, size: float = 0.02) -> tuple[Any, Tensor, Tensor]:
    """A packed model with an adapter of a given size relative to the weight, the decoded weight, and the change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 128))
    quantize_(model, fmt, include=["0"])
    before = model[0].dequantize()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["0", "1"]))
    layer = tuned.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        layer.lora_B["default"].weight *= size * before.norm() / layer.get_delta_weight("default").norm()
    return tuned, before, layer.get_delta_weight("default").detach()


def kept(after: Any, before: Tensor, delta: Tensor) -> float:
    return float(((after.dequantize() - before) * delta).sum() / (delta * delta).sum())


@pytest.mark.parametrize("fmt", ["q2k", "q4k", "q4_0", "afq3", "afq4", "hqq4"])
def test_a_loss_is_said_once_with_its_size(fmt: str) -> None:
    model, before, delta = small(fmt)
    merged, message = warned(model.merge_and_unload)
    share = kept(merged[0], before, delta)
    assert share < 0.9 and "1 of 1 packed layers" in message and f" {100 * share:.0f} %" in message
    for way in ("source=", "merge_format=", "unmerged", "dequantize_"):
        assert way in message


@pytest.mark.parametrize("fmt", ["q8_0", "afq8", "hqq8", "q8k"])
def test_a_merge_that_keeps_the_adapter_says_nothing(fmt: str) -> None:
    model, before, delta = small(fmt)
    merged = silent(model.merge_and_unload)
    assert kept(merged[0], before, delta) > 0.9


@pytest.mark.parametrize("wide", [8, "q8_0", "fp8", "afq8", "8"])
@pytest.mark.parametrize("fmt", ["q2k", "q4k", "afq4"])
def test_more_bits_keep_it(fmt: str, wide: Any) -> None:
    model, before, delta = small(fmt, 0.1 if wide == "fp8" else 0.02)
    bytes_before, output = state_bytes(model), model(torch.ones(1, 256))
    with merging(merge_format=wide):
        silent(model.merge_adapter)
    assert model.base_model.model[0].get_base_layer().format == {8: "q8_0", "8": "q8_0"}.get(wide, wide)
    assert kept(model.base_model.model[0].get_base_layer(), before, delta) > 0.9
    model.unmerge_adapter()
    assert state_bytes(model) == bytes_before and torch.equal(model(torch.ones(1, 256)), output)
    with merging(merge_format=wide):
        merged = silent(model.merge_and_unload)
    assert kept(merged[0], before, delta) > 0.9


def test_rows_without_a_change_keep_their_bytes() -> None:
    model, _, _ = small("q2k", 0.5)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight[:100] = 0
    before = state_bytes(layer.base_layer)["weight"]
    after = state_bytes(model.merge_and_unload())["0.weight"]
    cut = len(before) // 128 * 100
    assert after[:cut] == before[:cut] and after[cut:] != before[cut:]


def test_a_layer_that_merges_by_itself_says_what_is_lost() -> None:
    model, before, delta = small("q4k")
    layer = model.base_model.model[0]
    _, message = warned(layer.merge)
    assert "a layer that merges by itself" in message and kept(layer.base_layer, before, delta) < 0.9
    with merging(source="."), pytest.raises(ValueError, match="needs the names of the layers"):
        layer.unmerge() or layer.merge()


def test_the_wishes_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown format 'q9'"), merging(merge_format="q9"):
        pass
    with pytest.raises(FileNotFoundError, match="no folder or file 'nowhere'"), merging(source="nowhere"):
        pass
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64))
    quantize_(model, "q4_0")
    model = tuned(model, peft.LoraConfig(target_modules=["0"]))
    before = state_bytes(model)
    with merging(merge_format="q6k"), pytest.raises(ValueError, match="0 has rows of 96 weights, and merge_format q6k"):
        model.merge_adapter()
    assert state_bytes(model) == before and not model.base_model.model[0].merged
