"""`isqtorch quantize --isq q4k,q8_0`: one reading and one calibration, and the bytes of single runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

import isqtorch  # noqa: E402
from isqtorch.app import several  # noqa: E402
from isqtorch.app.model import LoadedModel  # noqa: E402
from isqtorch.cli import main  # noqa: E402
from isqtorch.report.fit import Memory  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "examples/demo_model/model")
TEXT = ROOT / "examples/demo_model/calibration.txt"


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT.read_text(encoding="utf-8")[:5000], encoding="utf-8")
    return str(file)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The formats that models are loaded in."""
    seen: list[str | None] = []
    real = LoadedModel._load

    def load(self: LoadedModel, isq: str | None) -> Any:
        seen.append(isq)
        return real(self, isq)

    monkeypatch.setattr(LoadedModel, "_load", load)
    return seen


def written(folder: Path) -> dict[str, Any]:
    """The files. Loading in a format records the request as it was typed; packing a model records 4, and no budget."""
    names = ("model.safetensors", "generation_config.json", "tokenizer.json")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    record = config["quantization_config"]
    record.pop("target_bpw", None)
    record["isq"] = str(record["isq"])
    return {"config": config, **{name: (folder / name).read_bytes() for name in names}}


@pytest.mark.parametrize("options", [[], ["calibration"]], ids=["plain", "calibrated"])
def test_the_bytes_are_those_of_single_runs(
    options: list[str], text: str, tmp_path: Path, loads: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--calibration-file", text] if options else []
    formats = ["q3k", "auto", "4", "hqq4"]
    command = ["quantize", "-m", MODEL, *given]
    assert main([*command, "--isq", ",".join(formats), "--target-bpw", "5", "-o", str(tmp_path / "all"), "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert loads == [None] and list(reports) == formats
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(formats)
    for fmt in formats:
        alone = tmp_path / f"alone-{fmt}"
        budget = ["--target-bpw", "5"] if fmt == "auto" else []
        assert main([*command, "--isq", fmt, *budget, "-o", str(alone), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert written(tmp_path / "all" / fmt) == written(alone), fmt
        assert [layer["stored"] for layer in report["layers"]] == [layer["stored"] for layer in reports[fmt]["layers"]]


def test_one_calibration(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isqtorch.integrations import pretrained

    calls = []
    real = pretrained.collect_imatrix
    monkeypatch.setattr(pretrained, "collect_imatrix", lambda *a, **k: calls.append(1) or real(*a, **k))
    out = str(tmp_path / "out")
    assert main(["quantize", "-m", MODEL, "--isq", "q3k,q4k,q2k", "--calibration-file", text, "-o", out]) == 0
    assert len(calls) == 1


def test_floats_that_do_not_fit_are_read_again(
    tmp_path: Path, loads: list[str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(several, "memories", lambda: [Memory("RAM", 1 << 30, 20_000_000)])
    assert main(["quantize", "-m", MODEL, "--isq", "q4k,q8_0", "-o", str(tmp_path / "out")]) == 0
    assert loads == ["q4k", "q8_0"]
    assert "is read once for each format: 14.69 MB of floats and 7.81 MB packed" in capsys.readouterr().err
    assert isqtorch.load(tmp_path / "out/q8_0").report.bytes_after == isqtorch.plan(MODEL, "q8_0").bytes_after


def test_packed_sources_are_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, _ = isqtorch.load(MODEL, "q6k")
    isqtorch.export_gguf(model, tmp_path / "demo.gguf", tokenizer)
    assert main(["quantize", "-m", str(tmp_path / "demo.gguf"), "--isq", "q4k,q6k", "-o", str(tmp_path / "out")]) == 0
    assert "its weights are packed already" in capsys.readouterr().err
    kept = isqtorch.load(tmp_path / "out/q6k").model
    assert torch.equal(kept.model.layers[0].mlp.up_proj.weight.plain, model.model.layers[0].mlp.up_proj.weight.plain)


def test_the_shared_floats_stay_what_they_are() -> None:
    model = isqtorch.load(MODEL).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = several.sharing_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    isqtorch.quantize_(copied, "q2k", progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "hf_quantizer") or model.hf_quantizer is None
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--isq", "q4k,"], "unknown format ''"),
        (["--isq", "q4k,q9z"], "unknown format 'q9z'"),
        (["--isq", "q4k,q8_0", "--plot", "x.png"], "--plot is one file"),
        (["--isq", "q4k,q8_0", "--save-topology", "x.yaml"], "--save-topology is one file"),
        (["--isq", "q4k,auto"], "'auto' needs one of target_bpw"),
    ],
)
def test_mistakes_are_found_before_the_work(
    argv: list[str], message: str, tmp_path: Path, loads: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "-m", MODEL, *argv, "-o", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not loads and not (tmp_path / "out").exists()


def test_a_folder_with_a_model_takes_no_others(
    tmp_path: Path, loads: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert main(["quantize", "-m", MODEL, "--isq", "q4k,q8_0", "-o", str(out), "--force"]) == 1
    assert "is a model itself" in capsys.readouterr().err
    (out / "config.json").unlink()
    (out / "q8_0").mkdir()
    (out / "q8_0/mine").write_text("x")
    assert main(["quantize", "-m", MODEL, "--isq", "q4k,q8_0", "-o", str(out)]) == 1
    assert "q8_0 exists and is not an empty folder" in capsys.readouterr().err and not loads
