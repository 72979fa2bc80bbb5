"""`plan --recommend`: the most bits that fit into a memory, and commands that can be typed as they are printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from models import tiny_llama

import isqtorch
from isqtorch.cli import build_parser, main
from isqtorch.report import fit, recommend
from isqtorch.report.recommend import BITS

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "examples/demo_model/model")


def asked(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> dict[str, Any]:
    assert main(["plan", "-m", MODEL, "--recommend", "--json", *argv]) == status, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("bits", BITS)
def test_the_most_bits_that_fit(bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte less than a format needs is room for the next smaller one."""
    start = asked(capsys, "--memory", "1GB")
    needed = isqtorch.plan(MODEL, bits).bytes_after + start["cache_bytes"] + start["largest_weight"]
    assert asked(capsys, "--memory", str(needed))["recommended"]["bits"] == bits
    less = asked(capsys, "--memory", str(needed - 1), status=0 if bits != BITS[-1] else 1)["recommended"]
    assert less is None if bits == BITS[-1] else less["bits"] == BITS[BITS.index(bits) + 1]


def test_the_commands_can_be_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = tmp_path / "my layers.yaml"
    topology.write_text("0: q8_0\n")
    monkeypatch.chdir(tmp_path)
    found = asked(capsys, "--memory", "10MB", "--topology", str(topology))
    run, quantize = (shlex.split(command) for command in found["commands"])
    assert run[:2] == ["isqtorch", "run"] and build_parser().parse_args(run[1:]).topology == str(topology)
    assert main(quantize[1:]) == 0
    written = isqtorch.load(quantize[quantize.index("-o") + 1]).report
    assert written.bytes_after == found["recommended"]["bytes"]


def test_text_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", MODEL, "--recommend", "--memory", "5MB"]) == 1
    out = capsys.readouterr().out
    assert "Nothing fits: 2 bits" in out and "are missing" in out
    assert main(["plan", "-m", MODEL, "--recommend", "--memory", "1GB"]) == 0
    out = capsys.readouterr().out
    assert "Take 8 bits, q8_0: 7.81 MB" in out and "--isq 4" in out


def test_packed_weights_are_best_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More bits than a file has do not bring back what it lost; fewer are for less memory."""
    file = tmp_path / "demo.gguf"
    model, tokenizer, report = isqtorch.load(MODEL, "q8_0")
    isqtorch.export_gguf(model, file, tokenizer)
    command = ["plan", "-m", str(file), "--recommend", "--json"]
    assert main([*command, "--memory", "1GB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"]["bits"] is None and found["faster"] is None
    assert found["recommended"]["bytes"] == pytest.approx(report.bytes_after, rel=0.01)
    assert all("--isq" not in line for line in found["commands"])
    small = found["cache_bytes"] + found["largest_weight"] + isqtorch.plan(file, 4).bytes_after
    assert main([*command, "--memory", str(small)]) == 0
    assert json.loads(capsys.readouterr().out)["recommended"]["bits"] == 4


def test_a_gpu_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(hidden=256).save_pretrained(tmp_path)
    places = [
        fit.Memory("RAM", 1 << 40, 1 << 40),
        fit.Memory("cuda:0", 1 << 30, 1 << 20),
        fit.Memory("cuda:1", 1 << 30, 1 << 30),
    ]
    for module in (fit, recommend):
        monkeypatch.setattr(module, "memories", lambda: places)
    assert recommend.recommend(tmp_path).memory.name == "cuda:1"
    assert recommend.recommend(tmp_path, device="cuda").memory.name == "cuda:0"
    assert recommend.recommend(tmp_path, device="cpu").memory.name == "RAM"
    with pytest.raises(ValueError, match="cpu, cuda:0, cuda:1; got 'mps'"):
        recommend.recommend(tmp_path, device="mps")


def test_what_the_commands_cannot_open_is_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"layers.0.weight": torch.randn(256, 256)}, tmp_path / "some.safetensors")
    assert main(["plan", "-m", str(tmp_path / "some.safetensors"), "--recommend", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["commands"] == ["isqtorch.quantize_(model, 8)"] and "cannot open" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recommend", "--isq", "4"], "--recommend chooses a format; leave out --isq"),
        (["--recommend", "--memory", "much"], "--memory must be a number of bytes"),
        (["--recommend", "--memory", "0"], "--memory must be a number of bytes"),
        (["--memory", "8GB"], "--memory is for --recommend"),
        (["--device", "cpu"], "--device is for --recommend"),
        (["--recommend", "--context", "0"], "context"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", MODEL, *argv]) == 1
    assert message in capsys.readouterr().err
