"""IsqConfig("auto") and `--isq auto`: the checkpoint is measured while it is read, and then packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from hf import load  # noqa: E402
from models import state_bytes, tiny_llama  # noqa: E402

import isqtorch  # noqa: E402
from isqtorch import IsqConfig  # noqa: E402
from isqtorch.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "examples/demo_model/model")


def tiny_moe() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def imatrix(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        layer.name: torch.rand(layer.shape[-1], generator=generator)
        for layer in isqtorch.plan(model, 4).layers
        if layer.kind in ("linear", "experts")
    }


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=True), tiny_moe], ids=["llama", "tied", "moe"])
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "imatrix"])
def test_loading_chooses_what_quantize_chooses(make: Any, weighed: bool, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    options = {"target_bpw": 4.3, "imatrix": imatrix(make()) if weighed else None}
    direct = load(tmp_path)
    want = isqtorch.quantize_(direct, "auto", progress=False, **options)
    model = load(tmp_path, quantization_config=IsqConfig("auto", **options))
    report = model.isq_report
    assert {layer.name: layer.stored for layer in report.layers} == {layer.name: layer.stored for layer in want.layers}
    assert state_bytes(model) == state_bytes(direct)
    assert report.choice is not None and report.choice.measure == ("output" if weighed else "weight")
    assert report.bits_per_weight <= 4.3 and report.requested == "auto"


def test_a_mix_loads_as_quantize_does(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    direct = load(tmp_path)
    isqtorch.quantize_(direct, "q4k_m", progress=False)
    model = load(tmp_path, quantization_config=IsqConfig("q4k_m"))
    assert state_bytes(model) == state_bytes(direct)
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert state_bytes(again) == state_bytes(direct)
    assert json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["isq"] == "q4k_m"


def test_what_auto_loaded_is_saved_and_loads_again(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = IsqConfig(
        "auto", max_size="900kB", formats=["q3k", 4, "q8_0"], imatrix={"model.layers.0.mlp.up_proj": torch.ones(256)}
    )
    model = load(tmp_path, quantization_config=config)
    assert model.isq_report.bytes_after <= 900_000
    model.save_pretrained(tmp_path / "packed")
    assert state_bytes(load(tmp_path / "packed")) == state_bytes(model)


def test_a_head_that_the_checkpoint_lacks_counts_as_float(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="IsqConfig: 2 bits per weight cannot be reached"):
        load(tmp_path, quantization_config=IsqConfig("auto", target_bpw=2))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=IsqConfig("auto", target_bpw=4.5), num_labels=16
    )
    assert type(model.score) is torch.nn.Linear and model.isq_report["score"].stored is None
    assert model.isq_report.bits_per_weight <= 4.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "IsqConfig: 'auto' needs one of target_bpw"),
        ({"target_bpw": -1}, "IsqConfig: target_bpw must be a positive number"),
        ({"target_bpw": 4, "formats": "q4k"}, "IsqConfig: formats must be a list"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IsqConfig("auto", **options)
    with pytest.raises(ValueError, match="target_bpw is for the format 'auto'"):
        IsqConfig("q4k", target_bpw=4)


def test_the_command_writes_model_topology_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, layers = tmp_path / "out", tmp_path / "layers.yaml"
    auto = ["--isq", "auto", "--target-bpw", "4.5", "--save-topology", str(layers), "--plot", str(tmp_path / "p.png")]
    assert main(["quantize", "-m", MODEL, *auto, "-o", str(out), "--json"]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert 4.4 < report["bits_per_weight"] <= 4.5 and report["choice"]["budget"] == "4.5 bits per weight"
    assert (tmp_path / "p.png").is_file()
    again = tmp_path / "again"
    assert main(["quantize", "-m", MODEL, "--isq", "8", "--topology", str(layers), "-o", str(again)]) == 0
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert main(["run", "-m", str(out), "-p", "The", "--max-new-tokens", "3"]) == 0


def test_the_command_measures_on_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples/demo_model/calibration.txt").read_text(encoding="utf-8")[:8000])
    auto = ["--isq", "auto", "--max-size", "4200000", "--calibration-file", str(text), "--choose-from", "3", "4", "6"]
    assert main(["quantize", "-m", MODEL, *auto, "-o", str(tmp_path / "out"), "--json"]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert report["choice"]["measure"] == "kl" and report["bytes_after"] <= 4_200_000
    assert {layer["stored"] for layer in report["layers"]} <= {"q3k", "q4k", "q6k"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "-m", MODEL, "--isq", "auto", "-p", "x"], "--isq: 'auto' needs one of target_bpw"),
        (["run", "-m", MODEL, "--isq", "q4k", "--target-bpw", "4", "-p", "x"], "target_bpw is for the format 'auto'"),
        (["run", "-m", MODEL, "--target-bpw", "4", "-p", "x"], "the options of auto need --isq FORMAT"),
        (["plan", "-m", MODEL, "--isq", "auto"], "plan: 'auto' chooses formats by measuring weights"),
        (["plan", "-m", MODEL, "--plot", "x.png"], "--plot draws one format"),
        (["bench", "-m", MODEL, "--isq", "auto"], "bench takes no 'auto'"),
    ],
)
def test_bad_commands(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    assert message in capsys.readouterr().err


def test_another_format_after_auto(tmp_path: Path) -> None:
    from isqtorch.app.model import LoadedModel

    loaded = LoadedModel(MODEL, "auto", options={"target_bpw": 4.5})
    loaded.requantize("q8_0")
    assert loaded.report is not None and {layer.stored for layer in loaded.report.quantized} == {"q8_0"}
    loaded.requantize("q4k_m")
    loaded.requantize("auto")
    assert loaded.report.bits_per_weight <= 4.5
