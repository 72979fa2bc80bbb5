"""The `isqtorch` command: what each subcommand prints, its JSON, its exit status, and one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isqtorch.cli import COMMANDS, doctor, main
from isqtorch.formats import formats, get_format

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "examples/demo_model/model")
TEXT = str(ROOT / "examples/demo_model/heldout.txt")


def run(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert run(*argv, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# ---- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"    isqtorch {command}" in capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["quantize"],
        ["run"],
        ["serve", "-m", MODEL, "--port", "x"],
        ["bench", "--isq", "4"],
        ["formats", "--json", "--markdown"],
        ["perplexity", MODEL, "--text", TEXT, "--mode", "x"],
        ["quantize", "-m", MODEL, "--isq", "4", "-o", "x", "--organization", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("isqtorch") and "--help" in text and text.count("\n") == 1


def test_letters_that_an_encoding_lacks_are_escaped() -> None:
    """As where Windows writes into a file or a pipe: the reply of a model has letters of all languages."""
    script = """
import sys
from isqtorch import cli
def say(args):
    print("caf\u00e9 \u732b")
    return 0
cli.formats.run = say
sys.exit(cli.main(["formats"]))
"""
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, b"caf\\xe9 \\u732b"), done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import isqtorch

    assert run("--version") == 0
    assert capsys.readouterr().out == f"isqtorch {isqtorch.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "-m", MODEL, "--isq", "q4z"], "q4z"),
        (["plan", "-m", MODEL, "--isq", "7"], "7 bits"),
        (["plan", "-m", "./no/such/folder", "--isq", "4"], "no/such/folder"),
        (["plan", "-m", MODEL, "--isq", "4", "--topology", "none.yaml"], "none.yaml"),
        (["plan", "-m", MODEL, "--context", "0"], "context"),
        (["serve", "-m", MODEL, "--port", "70000"], "--port"),
        (["serve", "-m", "./none"], "./none"),
        (["serve", "-m", MODEL, "--host", "999.1.1.1", "--port", "0"], "cannot listen on 999.1.1.1"),
        (["bench", "-m", MODEL, "--isq", "4,q9"], "q9"),
        (["bench", "-m", MODEL, "--no-baseline"], "nothing to measure"),
        (["bench", "-m", MODEL, "--isq", "4", "--gen-len", "1"], "--gen-len"),
        (["bench", "-m", MODEL, "--isq", "4,8", "--in-process"], "measures one format"),
        (["bench", "-m", MODEL, "--in-process", "--prompt-len", "1024"], "context of 1024"),
        (["run", "-m", "./none", "--prompt", "x"], "./none"),
        (["quantize", "-m", MODEL, "--isq", "q4z", "-o", "out"], "q4z"),
        (["quantize", "-m", MODEL, "--isq", "q4k", "-o", MODEL], "is the model itself"),
        (["quantize", "-m", str(ROOT / "tests"), "--isq", "q4k", "-o", "out"], "config.json"),
        (["perplexity", "./none", "--text", TEXT], "./none"),
        (["perplexity", MODEL, "--text", "none.txt"], "none.txt"),
        (["perplexity", MODEL, "--text", TEXT, "--kl"], "--isq"),
        (["perplexity", MODEL, "--text", str(Path(MODEL) / "model.safetensors")], "UTF-8"),
        (["perplexity", MODEL, "--text", TEXT, "--tokens", "64", "--context", "100000"], "max_position_embeddings"),
        (["demo", "--formats", "4", "q9"], "q9"),
        (["demo", "--tokens", "1"], "--tokens"),
        (["demo", "--plot", "no/such/folder/x.png"], "no/such/folder"),
    ],
)
def test_a_users_mistake_is_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 1
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]  # loading may have warned above it
    assert last.startswith("isqtorch: ")
    assert message in last
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="q4z"):
        main(["--debug", "plan", "-m", MODEL, "--isq", "q4z"])


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "check_kernels", interrupt)
    assert run("doctor") == 130
    assert capsys.readouterr().err == "isqtorch: interrupted\n"


def test_missing_transformers_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes its import fail
    assert run("perplexity", MODEL, "--text", TEXT) == 1
    assert "isqtorch[hf]" in capsys.readouterr().err


def test_missing_server_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    utils = pytest.importorskip("transformers.utils.import_utils")
    monkeypatch.setattr(utils, "is_serve_available", lambda: False)
    monkeypatch.delitem(sys.modules, "isqtorch.app.server", raising=False)
    assert run("serve", "-m", MODEL) == 1
    assert "pip install 'isqtorch[serve]'" in capsys.readouterr().err


def test_module_and_closed_pipe() -> None:
    command = f"{sys.executable} -m isqtorch formats | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    assert done.stdout.startswith("format")
    assert done.stderr == ""


# ---- formats, plan, doctor -------------------------------------------------------------------------------------------


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    entries = run_json(capsys, "formats")
    assert list(entries) == list(formats())
    assert entries["q4k"]["block_bytes"] == get_format("q4k").block_bytes
    assert list(run_json(capsys, "formats", "--variants")) == list(formats(variants=True))
    assert run("formats") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(formats())


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "plan", "-m", MODEL, "--isq", "4")
    stored = {layer["stored"] for layer in report["layers"]}
    assert report["planned"] and {"q4k", "q6k"} <= stored  # q6k: the promoted embedding
    assert run("plan", "-m", MODEL, "--isq", "4") == 0
    assert "model.layers.[0-7].mlp.down_proj" in capsys.readouterr().out
    assert run("plan", "-m", MODEL, "--isq", "4", "--details") == 0
    assert "model.layers.7.mlp.down_proj" in capsys.readouterr().out


def test_plan_of_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "plan", "-m", MODEL)
    assert list(found["formats"]) == list(formats())
    one = run_json(capsys, "plan", "-m", MODEL, "--isq", "q3k")
    assert found["formats"]["q3k"]["bytes"] == one["bytes_after"] < found["bytes_now"] == one["bytes_before"]
    assert found["context"] == 1024 and found["cache_bytes"] == one["cache_bytes"] == 1024 * 8 * 2 * 2 * 64 * 2
    assert found["memories"][0]["name"] == "RAM" and found["formats"]["q3k"]["fits"] == one["fits"]
    assert run("plan", "-m", MODEL) == 0
    out = capsys.readouterr().out
    assert len(out.split("\n\n")[0].splitlines()) == 3 + len(formats()) and "cache of 1024 tokens: 4.19 MB" in out


def test_doctor_finds_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "doctor")
    assert found["ok"] and list(found["formats"]) == list(formats())
    assert "GGUF" in found["opens"] or "not installed" in found["opens"]
    assert found["native"]["isa_selected"] in found["native"]["isa_supported"]
    kernels = found["native"]["linear"]["q4k"]
    assert kernels[0]["first"] == 1 and kernels[-1]["last"] is None
    assert [kernel["last"] + 1 for kernel in kernels[:-1]] == [kernel["first"] for kernel in kernels[1:]]


def test_doctor_shows_the_kernels_of_linear(capsys: pytest.CaptureFixture[str]) -> None:
    from isqtorch.ops import cpu_info

    assert run("doctor") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("q4k "))
    assert all(f"{use.rows}: {use.kernel}" in line for use in cpu_info().linear["q4k"])


@pytest.mark.parametrize("which", [0, -1], ids=["fewest", "most"])
def test_doctor_checks_each_kernel_of_linear(
    which: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from isqtorch.ops import cpu_info

    right, kernel = torch.ops.isqtorch.linear, cpu_info().linear["q5k"][which]

    def wrong(x: torch.Tensor, weight: torch.Tensor, format: str) -> torch.Tensor:
        here = kernel.first <= len(x) and (kernel.last is None or len(x) <= kernel.last)
        return right(x, weight, format) * (1.02 if here and format == "q5k" else 1)

    monkeypatch.setattr(torch.ops.isqtorch, "linear", wrong)
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert f"linear is too far off with {kernel.rows} rows of x" in out and "FAIL: q5k" in out


def test_doctor_finds_a_broken_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from isqtorch.ops import reference

    right = reference.dequantize

    def wrong(weight: torch.Tensor, format: str, dtype: torch.dtype) -> torch.Tensor:
        return right(weight, format, dtype) * (1.5 if format == "q5k" else 1)

    monkeypatch.setattr(reference, "dequantize", wrong)
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == 2 and "FAIL: q5k" in out


# ---- quantize, perplexity --------------------------------------------------------------------------------------------


def test_perplexity_and_divergence_have_windows_with_bos(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from isqtorch.app import model as app
    from isqtorch.integrations.opening import Opened

    class WithBos:
        bos_token_id = 3

        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [3, *self.tokenizer(text, **options)["input_ids"]]}

    options = [MODEL, "--text", TEXT, "--isq", "q4k", "--kl", "--tokens", "100", "--context", "32"]
    plain = run_json(capsys, "perplexity", *options)
    real = Opened.companions.func
    monkeypatch.setattr(
        Opened,
        "companions",
        property(lambda self: replace(real(self), tokenizer=WithBos(real(self).tokenizer))),
    )
    seen: list[list[int]] = []

    class Watched(app.LoadedModel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.model.model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
            )

    monkeypatch.setattr(app, "LoadedModel", Watched)
    with_bos = run_json(capsys, "perplexity", *options)
    assert plain["tokens"] == 100 - 4 and with_bos["tokens"] == 99
    assert len(seen) == 3 * 4 and all(first == [3] for first in seen)  # perplexity, model and reference: 4 windows each


def test_quantize_and_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The written folder has the perplexity of the model quantized in memory, to the last bit."""
    pytest.importorskip("transformers")
    out = tmp_path / "q4k"
    report = run_json(capsys, "quantize", "-m", MODEL, "--isq", "q4k", "-o", str(out))
    assert {layer["stored"] for layer in report["layers"]} == {"q4k", "q6k"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}

    few = ("--text", TEXT, "--tokens", "600", "--context", "256")
    loaded = run_json(capsys, "perplexity", str(out), *few)
    fresh = run_json(capsys, "perplexity", MODEL, "--isq", "q4k", "--kl", *few)
    original = run_json(capsys, "perplexity", MODEL, *few)
    assert loaded["perplexity"] == fresh["perplexity"]
    assert original["perplexity"] < fresh["perplexity"] * 1.05
    assert 0 < fresh["kl_mean"] < 0.05 and 80 < fresh["top1_agreement"] <= 100

    assert run("perplexity", str(out), "--isq", "q4k", *few) == 1
    assert "quantized already" in capsys.readouterr().err


def test_policy_options_reach_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topology = tmp_path / "layers.yaml"
    topology.write_text("0-2: q8_0\n/embed_tokens/: null\n")
    for command in (["plan"], ["quantize", "-o", str(tmp_path / "out")]):
        report = run_json(capsys, *command, "-m", MODEL, "--isq", "q4k", "--topology", str(topology))
        stored = {layer["name"]: layer["stored"] for layer in report["layers"]}
        assert stored["model.layers.1.mlp.up_proj"] == "q8_0"
        assert stored["model.layers.2.mlp.up_proj"] == "q4k"
        assert stored["model.embed_tokens"] is None
