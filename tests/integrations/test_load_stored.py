"""isqtorch.load, plan and the commands on folders that another library has quantized: FP8, MXFP4, GPTQ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import test_stored_fp8
import test_stored_integers
from families import DEMO
from models import state_bytes

import isqtorch
from isqtorch.cli import main

FOLDERS = {
    "block": test_stored_fp8.folders,
    "mxfp4": test_stored_fp8.folders,
    "gptq_g64": test_stored_integers.folders,
    "awq_g32": test_stored_integers.folders,
}


@pytest.fixture(scope="module", params=list(FOLDERS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = FOLDERS[request.param](tmp_path_factory.mktemp(request.param), request.param)
    return folder


def test_weights_stay_as_they_are(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, report = isqtorch.load(source)
    keep = isqtorch.load(source, "keep")
    assert report.bits_per_weight < 16 and state_bytes(keep.model) == state_bytes(model)
    assert any("the checkpoint is quantized already" in note for note in report.notes)
    assert main(["quantize", "-m", str(source), "-o", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert state_bytes(isqtorch.load(tmp_path / "out").model) == state_bytes(model)


def test_packed_anew_and_planned(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fmt in ("q8_0", "q4k"):
        planned, loaded = isqtorch.plan(source, fmt), isqtorch.load(source, fmt, progress=False)
        assert {layer.name: layer.stored for layer in planned.layers} == {
            layer.name: layer.stored for layer in loaded.report.layers
        }
        assert planned.bytes_after == loaded.report.bytes_after
    assert any("their errors stay" in note for note in planned.notes)
    assert planned.bytes_before == isqtorch.load(source).report.bytes_after
    assert main(["plan", "-m", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_now"] == planned.bytes_before


def test_the_format_changes_later(source: Path) -> None:
    from isqtorch.app.model import LoadedModel

    loaded = LoadedModel(str(source))
    loaded.requantize("q2k")
    assert state_bytes(loaded.model) == state_bytes(isqtorch.load(source, "q2k", progress=False).model)


def test_calibration_of_a_quantized_folder(tmp_path: Path) -> None:
    source, _ = test_stored_fp8.folders(tmp_path / "fp8", "block")
    for file in DEMO.glob("token*"):
        shutil.copy(file, source)
    words = tmp_path / "text.txt"
    words.write_text("a b c " * 400, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:  # the tiny model knows fewer tokens than the tokenizer
        patch.setattr("isqtorch.running._tokenize", lambda tokenizer, text: [3, 5, 7, 11] * 64)
        loaded = isqtorch.load(source, "q3k", calibration_file=words, progress=False)
    assert loaded.imatrix is not None and loaded.report.imatrix is not None
    again = isqtorch.load(source, "q3k", imatrix=loaded.imatrix, progress=False)
    assert state_bytes(again.model) == state_bytes(loaded.model)


def test_a_method_that_is_not_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = test_stored_fp8.folders(tmp_path / "fp8", "block")
    content = json.loads((source / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "aqlm"}
    (source / "config.json").write_text(json.dumps(content))
    for command in (
        ["quantize", "-m", str(source), "--isq", "4", "-o", str(tmp_path / "out")],
        ["plan", "-m", str(source)],
    ):
        assert main(command) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("isqtorch: ") and "aqlm" in error
    assert main(["quantize", "-m", str(source), "-o", str(tmp_path / "out")]) == 1
    assert "is quantized already by aqlm" in capsys.readouterr().err
