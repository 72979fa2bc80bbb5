"""Collecting importance for experts: fused, packed and listed ones, and those that saw no token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, squares
from models import ConvNet, MoEModel, tiny_gpt2, tiny_llama, tiny_moe
from torch import Tensor, nn

import isqtorch
from isqtorch.importance.imatrix import read_imatrix


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_fused_experts(family: str, implementation: str) -> None:
    """Against a loop over experts."""
    model = tiny_moe(family)
    model.set_experts_implementation(implementation)
    name, experts = next((n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Experts"))
    seen: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda module, args: seen.append((args[0].detach(), args[1])))
    ids = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        want = model(ids).logits
        with isqtorch.calibrate(model) as im:
            got = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (x, routing), _ = seen
    rows = x.reshape(-1, 64)
    for expert in range(6):
        token = (routing.reshape(len(rows), -1) == expert).nonzero()[:, 0]
        first, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        bias = experts.gate_up_proj_bias[expert] if family == "GptOss" else 0.0
        inner = experts._apply_gate(rows[token] @ (first if family == "GptOss" else first.t()) + bias)
        close(im.sums[f"{name}.gate_up_proj"][expert], squares(rows[token]))
        close(im.sums[f"{name}.down_proj"][expert], squares(inner))
        assert down.shape[0 if family == "GptOss" else 1] == inner.shape[1]
        for leaf in ("gate_up_proj", "down_proj"):
            assert im.counts[f"{name}.{leaf}"][expert] == len(token)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_packed_experts(family: str) -> None:
    """8-bit experts see nearly what the float ones see, and what they see is used: importance reaches each expert's matrix."""
    model = tiny_moe(family)
    ids = torch.randint(0, 64, (2, 30))
    with isqtorch.calibrate(model) as im:
        model(ids)
    first = isqtorch.quantize_(model, "q8_0", include="experts")
    with isqtorch.calibrate(model) as again:
        model(ids)
    names = [layer.name for layer in first.quantized]
    assert len(names) == 2 and set(names) < set(again) and sorted(again) == sorted(im)
    for name in names:
        assert torch.equal(again.counts[name], im.counts[name])
        torch.testing.assert_close(again[name], im[name], rtol=0.1, atol=0.02)
        module = model.get_submodule(name.rpartition(".")[0])
        assert "_multiply" not in vars(module)
    report = isqtorch.requantize_(model, "q4_0", source="stored", imatrix=again)
    assert not any("no entry" in note for note in report.notes), report.notes


@pytest.mark.parametrize("suffix", [".gguf", ".cimatrix", ".imatrix"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_moe], ids=["llama", "gpt2", "moe"])
def test_there_and_back_for_a_model(make: Callable[[], Any], suffix: str, tmp_path: Path) -> None:
    """Under GGUF's names in the file, under the model's again after; a GGUF file loses nothing at all."""
    model = make()
    with isqtorch.calibrate(model) as im:
        model(torch.randint(0, 64, (1, 6)))
    im.save(tmp_path / f"x{suffix}")
    again = read_imatrix(tmp_path / f"x{suffix}").for_model(model)
    assert sorted(again) == sorted(im)
    for name in im:
        if suffix == ".gguf":
            assert torch.equal(again.sums[name], im.sums[name]) and torch.equal(again.counts[name], im.counts[name])
        want, experts = im[name], len(im[name]) if im[name].ndim == 2 else None
        got = again.vector(name, want.shape[-1], experts)  # knows what a .cimatrix means by zeros
        torch.testing.assert_close(got, want, rtol=2e-7, atol=0)
    with pytest.raises(ValueError, match="no entry for any layer"):
        again.for_model(ConvNet())


def test_experts_without_data_count_all_columns_alike() -> None:
    model = tiny_moe()
    name = "model.layers.0.mlp.experts.down_proj"
    with isqtorch.calibrate(model) as im:
        model(torch.randint(0, 64, (1, 1)))
    counts = im.counts[name]
    assert counts.tolist().count(0) == 4 and im.unseen == {name: 4, name.replace("down", "gate_up"): 4}
    for expert, count in enumerate(counts):
        assert bool((im[name][expert] == 1).all()) == (count == 0)


def test_listed_experts_without_data(tmp_path: Path) -> None:
    """One linear layer per expert, of which some are never called: neutral, and one stack in llama.cpp's files."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"w2": nn.Linear(32, 8)}) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[1]["w2"](x)

    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"block_sparse_moe": Block()})])
    with isqtorch.calibrate(model) as im:
        model.layers[0]["block_sparse_moe"](2 * torch.ones(5, 32))
    assert im["layers.0.block_sparse_moe.experts.0.w2"].tolist() == [1.0] * 32
    im.save(tmp_path / "x.gguf")
    again = read_imatrix(tmp_path / "x.gguf")
    assert list(again) == ["blk.0.ffn_down_exps.weight"] and again.counts["blk.0.ffn_down_exps.weight"].tolist() == [
        0,
        5,
        0,
    ]
    for expert, value in enumerate((1.0, 4.0, 1.0)):
        vector = again.vector(f"layers.0.block_sparse_moe.experts.{expert}.w2", 32)
        assert vector is not None and vector.tolist() == [value] * 32


def test_other_layers_without_data_have_no_entry() -> None:
    model = MoEModel()
    with isqtorch.calibrate(model) as im:
        model.layers[0]["attention"](torch.randn(2, 256))
    assert [name for name in im if ".experts." not in name] == ["layers.0.attention"]


def test_experts_without_data_are_in_the_report() -> None:
    model = MoEModel()
    with isqtorch.calibrate(model) as im:
        model.layers[0]["attention"](torch.randn(2, 256))
    report = isqtorch.quantize_(model, "q4k", imatrix=im)
    assert any(note.startswith("8 expert matrices saw no token") for note in report.notes), report.notes
    assert any("layers have no entry" in note for note in report.notes)
