"""Model folders that lack something, or hold more than a command reads: one line that names the folder and the way out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from isqtorch.cli import main
from isqtorch.integrations.opening import Opened

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/demo_model/model"
TEXT = str(ROOT / "examples/demo_model/heldout.txt")

COMMANDS = {  # "model" is the folder
    "run": ["run", "-m", "model", "--prompt", "x"],
    "serve": ["serve", "-m", "model"],
    "perplexity": ["perplexity", "model", "--text", TEXT],
    "imatrix": ["imatrix", "model", TEXT, "-o", "x.cimatrix"],
    "quantize": ["quantize", "-m", "model", "--isq", "q4k", "-o", "out"],
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def without(*names: str) -> Path:
    folder = Path("model")
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns(*names))
    return folder


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command ends with."""
    assert main([*argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("isqtorch: ")
    return err


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "quantize"])  # which needs none
def test_no_tokenizer_files(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    without("tokenizer*")
    told = error(capsys, *COMMANDS[command])
    assert (
        "model has no tokenizer" in told and "tokenizer.json" in told and "tokenizer.save_pretrained('model')" in told
    )
    assert not os.path.exists("out")


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text", "gpt_neox", "llama"])
def test_no_tokenizer_is_made_of_nothing(kind: str) -> None:
    """transformers makes a tokenizer without any words for most of these."""
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match="model has no tokenizer, and run needs one"):
        Opened.of("./model").check_tokenizer("run")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer.json", "\x00\n\n"),
    ],
)
def test_damaged_tokenizer_files(file: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = without()
    (folder / file).write_text(text)
    told = error(capsys, *COMMANDS["run"])
    assert "the tokenizer in model cannot be loaded (" in told and "Copy its files again from the original" in told


def test_the_tokenizer_file_alone_is_enough() -> None:
    opened = Opened.of(str(without("tokenizer_config.json")))
    assert opened.companions.tokenizer("the function")["input_ids"]


@pytest.mark.parametrize("command", ["run", "serve", "perplexity", "quantize"])
def test_a_model_with_its_own_code(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is run, and nobody is asked, not even at a terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    folder = without()
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "zork", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("raise SystemExit('the code ran')\n")
    told = error(capsys, *COMMANDS[command])
    assert "model is a model with Python code of its own, which is not run unless you trust it" in told
    assert "trust_remote_code=True" in told
