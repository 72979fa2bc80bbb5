"""The options of quantize_: topology, rules, importance, progress; and a bad one changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import mlp, state_bytes, tiny_llama
from torch import nn

from isqtorch.importance.imatrix import Imatrix
from isqtorch.inplace.quantize import quantize_
from isqtorch.modules import QuantLinear

# ---- options ---------------------------------------------------------------------------------------------------------


def test_topology_include_exclude() -> None:
    model = tiny_llama()
    report = quantize_(model, "q4k", topology={"0-1": "q8_0", "/k_proj/": None, "/lm_head/": "q5k"}, exclude=["o_proj"])
    assert report["model.layers.0.mlp.up_proj"].stored == "q8_0"
    assert report["model.layers.1.mlp.up_proj"].stored == "q4k"
    assert report["model.layers.0.self_attn.k_proj"].stored is None
    assert report["model.layers.0.self_attn.o_proj"].reason == "excluded by 'o_proj'"
    assert report["lm_head"].stored == "q5k"


def test_topology_from_yaml_without_a_default(tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text("0: q8_0\n")
    model = tiny_llama()
    report = quantize_(model, None, topology=path)
    assert {layer.name.split(".")[2] for layer in report.quantized} == {"0"} and len(report.quantized) == 7


def test_what_matches_nothing_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="topology entry '9' matches no layer"):
        report = quantize_(mlp(), "q8_0", topology={"9": "q4k"})
    assert "topology entry '9' matches no layer" in report.notes
    with pytest.warns(UserWarning, match="quantize_ quantized nothing"):
        quantize_(mlp(), "q8_0", exclude=["."])


def test_devices(recwarn: pytest.WarningsRecorder) -> None:
    model = mlp()
    quantize_(model, "q8_0", device="cpu", topology={"/0/": {"device": "cpu"}})
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_rule_reaches_the_quantizer() -> None:
    weight = mlp(depth=1)[0].weight.detach()
    model = mlp(depth=1)
    quantize_(model, "afq2", rule="mlx")
    assert torch.equal(model[0].weight, torch.ops.isqtorch.quantize(weight, "afq2", None, "mlx"))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(mlp(), "q8_0", progress=True)
    assert "quantize_" in capsys.readouterr().err
    quantize_(mlp(), "q8_0", progress=False)
    quantize_(mlp(), "q8_0")  # stderr is no terminal here
    assert capsys.readouterr().err == ""


# ---- importance ------------------------------------------------------------------------------------------------------


def ramp(columns: int = 256) -> torch.Tensor:
    return torch.linspace(0.01, 1, columns)


def test_importance_from_a_dict() -> None:
    model, plain = mlp(), mlp()
    weight = model[1].weight.detach()
    report = quantize_(model, "q4k", imatrix={"1": ramp()})
    quantize_(plain, "q4k")
    assert torch.equal(model[1].weight, torch.ops.isqtorch.quantize(weight, "q4k", ramp()))
    assert not torch.equal(model[1].weight, plain[1].weight) and torch.equal(model[0].weight, plain[0].weight)
    assert report.notes == ["2 layers have no entry in the importance matrix and were quantized without: 0, 2"]


def test_importance_from_a_file_and_an_object(tmp_path: Path) -> None:
    path = tmp_path / "x.cimatrix"
    name = b"1"
    path.write_bytes(
        (1).to_bytes(8, "little")
        + len(name).to_bytes(8, "little")
        + name
        + (256).to_bytes(8, "little")
        + ramp().numpy().tobytes()
    )
    models = [mlp(), mlp(), mlp()]
    for model, imatrix in zip(models, (path, Imatrix({"1": ramp()}), {"1": ramp()}), strict=True):
        quantize_(model, "q4k", imatrix=imatrix)
    assert torch.equal(models[0][1].weight, models[2][1].weight) and torch.equal(
        models[1][1].weight, models[2][1].weight
    )


def test_formats_without_importance_are_noted() -> None:
    report = quantize_(mlp(), "q8_0", imatrix={"0": ramp()})
    assert report.notes == ["3 layers have formats that take no importance: 0, 1, 2"]


def test_tied_weights_use_the_heads_importance() -> None:
    model = tiny_llama(tied=True)
    weight = model.lm_head.weight.detach().clone()
    quantize_(model, "q4k", imatrix={"lm_head": ramp()})
    assert torch.equal(model.lm_head.weight, torch.ops.isqtorch.quantize(weight, "q6k", ramp()))


def test_dead_columns_are_warned_about() -> None:
    vector = ramp()
    vector[32:48] = 0
    with pytest.warns(UserWarning, match="importance of 1 is zero for columns 32 to 47"):
        quantize_(mlp(), "q4k", imatrix={"1": vector})


# ---- nothing is touched when something is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"imatrix": {"0": ramp(128)}}, {"rule": "nonsense"}, {"fallback": "never"}, {"topology": {"x": 4}}]
)
def test_a_bad_request_changes_nothing(options) -> None:
    model = mlp()
    before = state_bytes(model)
    with pytest.raises(ValueError):
        quantize_(model, "q4k", **options)
    assert state_bytes(model) == before and all(type(layer) is nn.Linear for layer in model)


def test_a_bad_weight_changes_nothing_and_is_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 17] = float("nan")
    with pytest.raises(
        ValueError, match=r"quantize_: model\.layers\.1\.mlp\.up_proj\.weight\[3, 17\] is nan; weights must be finite"
    ):
        quantize_(model, 4)
    assert type(model.lm_head) is nn.Linear
    quantize_(model, 4, exclude=["layers.1.mlp.up_proj"])


@pytest.mark.parametrize("fmt", ["q4_1", "q2k", "q8_0", "hqq4"])
def test_weights_too_large_for_the_scales_are_refused_before_anything_changes(fmt: str) -> None:
    model = nn.Sequential(nn.Linear(256, 8), nn.Linear(256, 8))
    with torch.no_grad():
        model[1].weight.fill_(1e9)
        model[1].weight[:, ::2] *= -1
    with pytest.raises(ValueError, match=rf"^quantize_: 1: the block of {fmt} from weight\[0, 0\].*Nothing was"):
        quantize_(model, fmt)
    assert all(type(layer) is nn.Linear for layer in model)
    quantize_(model, "q8k")  # the way out that the message names
    assert all(type(layer) is QuantLinear for layer in model)
