"""What `isqtorch quantize` refuses before the work, and that it destroys nothing: outputs, full disks, other models."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from models import state_bytes  # noqa: E402

import isqtorch  # noqa: E402
from isqtorch.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "examples/demo_model/model")
TEXT = str(ROOT / "examples/demo_model/heldout.txt")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("models", "holds the model"),
        ("models/original/packed", "lies in the folder of the model"),
        ("models/original", "is the model itself"),
        ("models/original/../original", "is the model itself"),
        ("link", "is not a folder; give a new one"),
        ("dangling", "is not a folder; give a new one"),
        ("here", "is the current folder"),
        (".", "is the current folder"),
        ("..", "is the current folder or holds it"),
        ("folders", "holds notes, which isqtorch did not write"),
    ],
)
def test_outputs_that_are_refused_before_the_work(
    output: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("isqtorch.app.model.LoadedModel", work)
    source = tmp_path / "models/original"
    shutil.copytree(MODEL, source)
    ours = {"quantization_config": {"quant_method": "isq"}}
    for folder in ("models", "here", "folders", "target"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(ours))
    (tmp_path / "folders/notes").mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nothing")
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    place = output if output.startswith(".") else str(tmp_path / output)
    assert main(["quantize", "-m", str(source), "--isq", "q2k", "-o", place, "--force"]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("bytes_left", [100, 1 << 16, 2 << 20])
def test_a_full_disk_is_one_line(tmp_path: Path, bytes_left: int) -> None:
    """A limit of the size of files stands for the disk; with the first two, the small files do not fit either."""
    run = subprocess.run(
        [sys.executable, "-m", "isqtorch", "quantize", "-m", MODEL, "--isq", "q8_0", "-o", str(tmp_path / "packed")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left)),
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("isqtorch: ")
    assert not list(tmp_path.iterdir())


def classifier(folder: Path, architectures: list[str] | None) -> str:
    """A tiny classifier in a folder, whose config.json names these classes."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    for file in Path(MODEL).glob("token*"):
        shutil.copy(file, folder)
    content = json.loads((folder / "config.json").read_text())
    content["architectures"] = architectures
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def commands(source: str, out: Path) -> list[list[str]]:
    """What needs text from a model."""
    return [
        ["run", "-m", source, "--prompt", "x"],
        ["serve", "-m", source, "--port", "0"],
        ["bench", "-m", source, "--in-process"],
        ["perplexity", source, "--text", TEXT, "--tokens", "64", "--context", "32"],
    ]


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None, []])
def test_a_model_without_the_head_that_its_class_has_is_refused(
    architectures: list[str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be filled with random numbers. Without a named class, the type's language model is meant."""
    source = classifier(tmp_path / "source", architectures)
    for command in (
        *commands(source, tmp_path)[::3],
        ["quantize", "-m", source, "--isq", "q8_0", "-o", str(tmp_path / "out")],
        ["imatrix", source, TEXT, "-o", str(tmp_path / "x.gguf")],
    ):
        assert main(command) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("isqtorch: ") and "LlamaForCausalLM" in error and "lm_head.weight" in error
        assert (architectures or ["model of type llama"])[0] in error and len(error) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaModel"])
def test_a_model_that_makes_no_text_is_refused_where_text_is_needed(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = classifier(tmp_path / "source", [architecture])
    for command in commands(source, tmp_path):
        if command[0] == "serve":
            continue  # it answers requests for embeddings: test_server_api.py
        assert main(command) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(
            f"isqtorch: {source} is a {architecture}, which does not generate text, but {command[0]} needs"
        )
        assert len(error) < 400


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaModel"])
def test_a_model_is_written_as_its_own_class(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = classifier(tmp_path / "source", [architecture]), tmp_path / "out"
    assert main(["quantize", "-m", source, "--isq", "q8_0", "-o", str(out)]) == 0
    report = capsys.readouterr().out
    assert ("score.weight" in report) == (architecture == "LlamaModel")  # the note about what has no place
    content = json.loads((out / "config.json").read_text())
    assert content["architectures"] == [architecture] and content["quantization_config"]["quant_method"] == "isq"
    want = getattr(transformers, architecture).from_pretrained(source)
    isqtorch.quantize_(want, "q8_0", progress=False)
    packed = getattr(transformers, architecture).from_pretrained(out)
    assert state_bytes(packed) == state_bytes(want)


def test_a_class_that_transformers_does_not_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = classifier(tmp_path / "source", ["LlamaForPoetry"])
    assert main(["quantize", "-m", source, "--isq", "q8_0", "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is a LlamaForPoetry, and the classes of transformers" in error and "LlamaForSequenceClassification" in error


# ---- the model card --------------------------------------------------------------------------------------------------


def test_a_model_card_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", "-m", MODEL, "--isq", "q4k", "-o", str(out)]) == 0
    text = (out / "README.md").read_text(encoding="utf-8")
    report = isqtorch.load(out).report
    assert text.startswith("---\nlibrary_name: transformers\n") and "LlamaForCausalLM" in text
    assert f"{report.bits_per_weight:.2f} bits per weight" in text
    assert re.search(r"^\| q4k \| \d+ \| 4\.50 \| [\d.]+ MB \| - \|$", text, re.M)
    assert "isqtorch quantize -m model --isq q4k -o out" in text and f"isqtorch {isqtorch.__version__}, torch " in text
    assert str(tmp_path) not in text and MODEL not in text  # paths of this machine
    for program in re.findall(r"```python\n(.*?)```", text, re.S):
        names: dict[str, Any] = {}
        exec(program.replace("FOLDER", str(out)), names)
        assert names["report"].bits_per_weight == report.bits_per_weight


def test_another_card_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["quantize", "-m", MODEL, "-o", str(out), "--force", "--isq"]
    assert main([*command, "q4k"]) == 0
    assert main([*command, "q8_0"]) == 0
    card = out / "README.md"
    assert "| q8_0 |" in card.read_text(encoding="utf-8") and "| q4k |" not in card.read_text(encoding="utf-8")
    card.write_text("# mine", encoding="utf-8")
    assert main([*command, "q4k"]) == 0
    assert card.read_text(encoding="utf-8") == "# mine"
