"""Commands with a calibration text: what it changes, what is kept of it, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

import isqtorch  # noqa: E402
from isqtorch.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "examples/demo_model/model")


def test_calibrating_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--calibration-file` gives what `quantize_` with that text gives, not what it gives without."""
    text = tmp_path / "text.txt"
    text.write_text(
        (ROOT / "examples/demo_model/calibration.txt").read_text(encoding="utf-8")[:12000], encoding="utf-8"
    )
    options = ["-m", MODEL, "--isq", "q2k", "-o"]
    assert main(["quantize", *options, str(tmp_path / "with"), "--calibration-file", str(text)]) == 0
    assert main(["quantize", *options, str(tmp_path / "without")]) == 0
    capsys.readouterr()
    load = transformers.AutoModelForCausalLM.from_pretrained
    direct = load(MODEL, dtype="auto").eval()
    isqtorch.quantize_(
        direct, "q2k", calibration_file=text, tokenizer=transformers.AutoTokenizer.from_pretrained(MODEL)
    )
    expected, found, plain = (
        model.state_dict() for model in (direct, load(tmp_path / "with"), load(tmp_path / "without"))
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(plain[name], value) for name, value in expected.items())


def test_what_calibration_showed_serves_every_format(tmp_path: Path) -> None:
    from isqtorch.app.model import LoadedModel

    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples/demo_model/calibration.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    changed, fresh = (LoadedModel(MODEL, fmt, options={"calibration_file": text}) for fmt in ("q2k", "q3k"))
    text.unlink()
    report = changed.requantize("q3k")
    assert any("chunks of" in note for note in report.notes)
    state, want = changed.model.state_dict(), fresh.model.state_dict()
    assert all(state[name].equal(want[name]) for name in want)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--isq", "4", "--calibration-file", "no-such.txt"], "no calibration text no-such.txt"),
        (
            ["--calibration-file", MODEL + "/config.json"],
            "--calibration-file, --rule, --max-memory, --activations and the options of auto need --isq",
        ),
    ],
)
def test_mistakes_with_a_calibration_file(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", MODEL, "--prompt", "x", *argv]) == 1
    assert message in capsys.readouterr().err
