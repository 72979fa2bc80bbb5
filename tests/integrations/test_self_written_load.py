"""calibration="self" in `load` and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

import isqtorch  # noqa: E402
import isqtorch.importance.self_written as writing  # noqa: E402
from isqtorch.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "examples/demo_model/model")
SAID = "text that the model wrote itself (8 sequences of 16 tokens)"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 8 sequences of 16 tokens."""
    monkeypatch.setitem(writing.write_windows.__kwdefaults__, "sequences", 8)
    monkeypatch.setitem(writing.write_windows.__kwdefaults__, "tokens", 16)


@pytest.mark.parametrize(
    ("isq", "options"), [("q4k", {}), ("q4_0", {"rule": "feedback"}), ("auto", {"target_bpw": 4.5})], ids=str
)
def test_load(isq: str, options: dict[str, Any]) -> None:
    loaded = isqtorch.load(DEMO, isq, calibration="self", progress=False, **options)
    assert any(SAID in note for note in loaded.report.notes)
    if isq == "auto":
        assert loaded.report.choice is not None and loaded.report.choice.measure == "kl"
    if not options:
        assert loaded.imatrix is not None and loaded.imatrix.datasets == (SAID,)


def test_load_refuses_an_encoder(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="calibration='self', which lets the model write a text, needs one that predicts"
    ):
        isqtorch.load(tmp_path, "q4_0", calibration="self", progress=False)


def test_from_pretrained_says_where_it_is_possible() -> None:
    with pytest.raises(ValueError, match=r"path of a text here.* isqtorch\.load, or quantize_"):
        isqtorch.IsqConfig("q4k", rule="feedback", calibration_file="self", tokenizer=object())


def test_quantize_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(tmp_path / "out")
    assert main(["quantize", "-m", DEMO, "--isq", "q4k", "--calibration", "self", "-o", place, "--json"]) == 0
    assert any(SAID in note for note in json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors"])
def test_imatrix_on_the_command_line(name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    assert main(["imatrix", DEMO, "--calibration", "self", "-o", str(place)]) == 0
    report = isqtorch.quantize_(isqtorch.load(DEMO, progress=False).model, "q4k", imatrix=place, progress=False)
    assert report.imatrix is not None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "required: TEXT"),
        (("text.txt", "--calibration", "self"), "unrecognized arguments: text.txt"),
        (("--calibration=self", "text.txt"), "unrecognized arguments: text.txt"),
    ],
)
def test_imatrix_wants_one_text(
    more: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["imatrix", DEMO, *more, "-o", str(tmp_path / "x.gguf")])
    assert message in capsys.readouterr().err
