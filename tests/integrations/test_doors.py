"""What a source is: files, folders, ids of the Hub from the cache without network, and errors of one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import DEMO
from test_load_checkpoints import gguf, mlx

import isqtorch
from isqtorch.cli import main
from isqtorch.integrations.checkpoints.doors import gguf_file, shards

ROOT = DEMO.parents[2]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("gguf") / "demo")


def test_a_folder_with_one_gguf_file(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "demo.gguf")
    (tmp_path / "README.md").write_text("a model")
    model, _, _ = isqtorch.load(tmp_path)
    assert model.config.name_or_path == str(tmp_path)
    assert isqtorch.requantize_(model, "q2k", source=tmp_path, progress=False).quantized
    shutil.copy(file, tmp_path / "other.gguf")
    for opening in (lambda: isqtorch.load(tmp_path), lambda: isqtorch.plan(tmp_path, 4)):
        with pytest.raises(ValueError, match=r"holds 2 GGUF files; give one of them: demo\.gguf, other\.gguf"):
            opening()
    shutil.copy(DEMO / "config.json", tmp_path)
    assert gguf_file(tmp_path) is None  # a transformers model with GGUF files beside it


def test_the_files_of_a_split_model(tmp_path: Path) -> None:
    names = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    assert shards("m-00001-of-00003.gguf") == names and shards("m.gguf") == ["m.gguf"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert gguf_file(tmp_path) == tmp_path / names[0]


def commands(source: str) -> list[list[str]]:
    return [
        ["run", "-m", source, "-p", "x"],
        ["quantize", "-m", source, "-o", "out"],
        ["plan", "-m", source],
        ["perplexity", source, "--text", str(DEMO.parent / "heldout.txt")],
        ["imatrix", source, str(DEMO.parent / "heldout.txt"), "-o", "x.gguf"],
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.gguf", None, "no file"),
        ("./none.gguf", None, "no file"),
        ("text.gguf", b"hello, world, this is no model", "GGUF"),
        ("short.gguf", b"GGUF\x03\0\0\0", "short.gguf: byte 8"),
        ("model.bin", b"hello", "give a"),
        ("./none", None, "none"),
        ("a/b/c", None, "a/b/c"),
    ],
)
def test_errors_are_one_line_that_names_the_source(
    name: str, content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for command in commands(name):
        assert main(command) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("isqtorch: ") and err.count("\n") == 1
        if not (command[0] == "plan" and name in ("model.bin", "./none", "a/b/c")):  # plan takes any safetensors file
            assert message in err and len(err) < 500, err
    assert {path.name for path in tmp_path.iterdir()} <= {name}


def test_an_unknown_architecture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gguf as package

    writer = package.GGUFWriter(str(tmp_path / "odd.gguf"), "poetry")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for command in commands(str(tmp_path / "odd.gguf")):
        assert main(command) == 1
        err = capsys.readouterr().err
        assert "'poetry'" in err and err.count("\n") == 1, err


def test_float_weights_need_a_format(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "-m", str(DEMO), "-o", str(tmp_path / "out")]) == 1
    assert "holds float weights: give --isq FORMAT" in capsys.readouterr().err
    assert main(["quantize", "-m", str(file), "--isq", "8", "-o", str(tmp_path / "packed")]) == 0
    assert main(["quantize", "-m", str(tmp_path / "packed"), "-o", str(tmp_path / "out")]) == 1
    assert "is quantized already by isq" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["quantize", "-m", str(file), "-o", str(file.parent), "--force"]) == 1
    assert "holds the model" in capsys.readouterr().err and file.is_file()


def test_a_gguf_file_of_floats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It opens as a float model, which can be quantized, and whose file requantize_ finds."""
    loaded = isqtorch.load(DEMO)
    path = tmp_path / "floats.gguf"
    isqtorch.export_gguf(loaded.model, path, loaded.tokenizer)
    model, _, report = isqtorch.load(path)
    assert not report.quantized and report.bits_per_weight > 15
    isqtorch.quantize_(model, "q2k", progress=False)
    assert isqtorch.requantize_(model, "q4k", progress=False).quantized
    assert main(["quantize", "-m", str(path), "-o", str(tmp_path / "out")]) == 1
    assert "holds no packed weights, and none was packed" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text((DEMO.parent / "heldout.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    assert isqtorch.load(path, "q3k", calibration_file=text, progress=False).imatrix is not None


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def cached(home: Path, repository: str, folder: Path) -> None:
    """Put files into a cache of the Hub, as its client lays them out."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


def test_what_the_cache_has_needs_no_network(file: Path, tmp_path: Path) -> None:
    """The endpoint refuses every connection, and nothing says that the client is offline."""
    cached(tmp_path, "org/demo", DEMO)
    cached(tmp_path, "org/demo-mlx", mlx(tmp_path / "mlx"))
    cached(tmp_path, "org/demo-gguf", file.parent)
    program = """
import logging, sys, time, isqtorch
began = time.time()
for source, fmt in (("org/demo", 4), ("org/demo-mlx", None), (f"org/demo-gguf:{sys.argv[1]}", None)):
    model, tokenizer, report = isqtorch.load(source, fmt)
    assert report.quantized or fmt is None
    assert len(tokenizer("The function")["input_ids"]) == 2 and model.config.name_or_path == source
    model.save_pretrained(sys.argv[2] + "/saved")
    isqtorch.requantize_(model, "q8_0", progress=False)
    isqtorch.plan(source, 4) if "demo-" in source else None
"""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", program, file.name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Retry" not in done.stderr  # of the client, after a connection that was refused

    env |= {"HF_HUB_OFFLINE": "1"}
    for source in ("org/none", "org/demo-gguf:none.gguf", "org/demo-gguf"):
        code = f"""
import sys; from isqtorch.cli import main
for command in (["run", "-p", "x"], ["plan"]):
    assert main([*command, "-m", {source!r}]) == 1
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False
        )
        lines = done.stderr.splitlines()
        assert done.returncode == 0 and len(lines) == 2, done.stderr[-2000:]
        assert all(line.startswith("isqtorch: ") and source in line and len(line) < 600 for line in lines), lines
        assert "A GGUF file on the Hub is owner/name:file.gguf" in lines[0] or ":none.gguf" in lines[0]
