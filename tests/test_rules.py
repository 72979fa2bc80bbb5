"""Which rule packs which layer: "search" spares delicate layers without importance; a number means the best rule, too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import isqtorch
from isqtorch.importance.rules import is_delicate
from tests.models import tiny_llama

SPARED = ("q_proj", "k_proj", "v_proj", "down_proj")


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.11.self_attn.v_proj"),
        *("transformer.h.0.attn.c_attn", "model.layers.0.self_attn.qkv_proj", "gpt_neox.layers.0.attention.query_key_value"),
        *("model.layers.0.mlp.down_proj", "transformer.h.0.mlp.c_proj", "model.layers.0.mlp.experts.down_proj"),
        "model.layers.0.block_sparse_moe.experts.3.w2",
    ],
)  # fmt: skip
def test_delicate_layers(name: str) -> None:
    assert is_delicate([name]) and is_delicate(["other", name])


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.gate_proj",
        "0",
        "",
    ],
)
def test_other_layers(name: str) -> None:
    assert not is_delicate([name])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.dtype == torch.uint8}


@pytest.mark.parametrize("fmt", ["afq3", "hqq4"])
def test_search_without_importance_leaves_them_to_the_default_rule(fmt: str) -> None:
    model = tiny_llama()
    default, searched = copy.deepcopy(model), copy.deepcopy(model)
    isqtorch.quantize_(default, fmt, progress=False)
    report = isqtorch.quantize_(searched, fmt, rule="search", progress=False)
    before, after = weights(default), weights(searched)
    for name in before:
        assert torch.equal(before[name], after[name]) == any(part in name for part in SPARED), name
    (note,) = [note for note in report.notes if "keep the default rule" in note]
    assert note.startswith("8 layers keep the default rule") and "q_proj" in note and "calibration=" in note


def test_search_with_importance_searches_everywhere() -> None:
    model = tiny_llama()
    im = isqtorch.collect_imatrix(model, torch.arange(400) % 100, chunk=64, progress=False)
    default, searched = copy.deepcopy(model), copy.deepcopy(model)
    isqtorch.quantize_(default, "afq3", progress=False)
    report = isqtorch.quantize_(searched, "afq3", rule="search", imatrix=im, progress=False)
    before, after = weights(default), weights(searched)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not any("keep the default rule" in note for note in report.notes)


def test_only_delicate_layers_is_no_error() -> None:
    report = isqtorch.quantize_(tiny_llama(), "afq3", rule="search", include=["v_proj"], progress=False)
    assert any("2 layers keep the default rule" in note for note in report.notes)


def test_auto_measures_with_the_rule_that_packs() -> None:
    model = tiny_llama()
    report = isqtorch.quantize_(
        copy.deepcopy(model),
        "auto",
        target_bpw=6,
        formats=["afq3", "afq4"],
        rule="search",
        probe="output",
        progress=False,
    )
    assert report.choice is not None
    measured = {name: options["afq3"].error for names, _, options in report.choice.items for name in names}
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"):
        weight = model.get_submodule(name).weight.detach().float()
        rule = None if "v_proj" in name else "search"
        packed = isqtorch.quantize(weight, "afq3", rule=rule)
        error = ((packed.dequantize() - weight).square().sum() / weight.square().sum()).item()
        assert measured[name] == pytest.approx(error, rel=1e-4), name


# ---- a number of bits ------------------------------------------------------------------------------------------------


def test_a_number_with_importance_searches_where_the_default_rule_ignores_it() -> None:
    model = tiny_llama(hidden=192)  # no multiple of 256: afq3 for 3 bits
    im = isqtorch.collect_imatrix(model, torch.arange(400) % 100, chunk=64, progress=False)
    number, name, plain = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    report = isqtorch.quantize_(number, 3, imatrix=im, exclude="lm_head|embed", progress=False)
    isqtorch.quantize_(name, "afq3", imatrix=im, rule="search", exclude="lm_head|embed", progress=False)
    isqtorch.quantize_(plain, "afq3", exclude="lm_head|embed", progress=False)
    key = "model.layers.0.mlp.up_proj"
    assert report[key].stored == "afq3"
    mine, theirs, default = (model.get_submodule(key).weight for model in (number, name, plain))
    assert torch.equal(mine.data, theirs.data) and not torch.equal(mine.data, default.data)
    assert any("layers use rule='search'" in note for note in report.notes)


def test_a_number_without_importance_is_the_default_rule() -> None:
    number, name = tiny_llama(hidden=192), tiny_llama(hidden=192)
    isqtorch.quantize_(number, 3, progress=False)
    isqtorch.quantize_(name, "afq3", progress=False)
    key = "model.layers.0.mlp.up_proj"
    assert torch.equal(number.get_submodule(key).weight.data, name.get_submodule(key).weight.data)
