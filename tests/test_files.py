"""Files on disk: which files of a folder are read, what is refused, and writes that are killed half-way."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import mlp
from safetensors.torch import save_file

from isqtorch.checkpoint import load_
from isqtorch.files.binary import open_binary, read_bytes, read_text
from isqtorch.files.checkpoints import checkpoint_files, opened, read_headers, read_json
from isqtorch.files.writing import recover, replacing, replacing_folder, write_atomically
from isqtorch.importance.imatrix import read_imatrix
from isqtorch.importance.windows import read_calibration_text
from isqtorch.inplace.source import TensorFiles, files_in

ROOT = Path(__file__).resolve().parent.parent


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_files(folder, "op")]


def sharded(folder: Path, variant: str = "") -> None:
    shards = {}
    for i in (1, 2):
        file = f"model{variant}-0000{i}-of-00002.safetensors"
        save_file({f"{i}.weight": torch.zeros(2)}, folder / file)
        shards[f"{i}.weight"] = file
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def test_the_files_that_transformers_would_load(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"op: .* holds no \.safetensors file"):
        checkpoint_files(tmp_path, "op")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    assert names(tmp_path) == ["model.fp16.safetensors"]  # there is nothing else
    sharded(tmp_path)
    assert names(tmp_path) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert names(tmp_path) == ["model.safetensors"]  # not the shards
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"transformers_weights": "model.fp16.safetensors"}))
    assert names(tmp_path) == ["model.fp16.safetensors"]
    config.write_text(json.dumps({"transformers_weights": "model.safetensors.index.json"}))
    assert len(names(tmp_path)) == 2
    for wrong in ("../model.safetensors", "weights.bin", 3, ["model.safetensors"]):
        config.write_text(json.dumps({"transformers_weights": wrong}))
        with pytest.raises(ValueError, match="'transformers_weights' is"):
            checkpoint_files(tmp_path, "op")


def test_the_choice_is_that_of_transformers(tmp_path: Path) -> None:
    modeling = pytest.importorskip("transformers.modeling_utils")
    sharded(tmp_path)
    sharded(tmp_path, ".fp16")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    for more in ([], ["model.safetensors"]):
        for file in more:
            save_file({"a": torch.zeros(1)}, tmp_path / file)
        theirs, _ = modeling._get_resolved_checkpoint_files(str(tmp_path), None, None, None, None, False)
        assert sorted(map(str, checkpoint_files(tmp_path, "op"))) == sorted(theirs)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": 3}, {"weight_map": {"a": 1}}, []])
def test_an_index_that_is_none(tmp_path: Path, content: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must map tensor names to file names|is not a JSON object"):
        checkpoint_files(tmp_path, "op")


READERS: dict[str, Callable[[Path], object]] = {
    "imatrix": read_imatrix,
    "text": read_text,
    "calibration": read_calibration_text,
    "calibration by name": lambda path: read_calibration_text(str(path)),
    "json": read_json,
    "bytes": lambda path: read_bytes(path, 10),
    "binary": lambda path: open_binary(path).__enter__(),
    "safetensors": lambda path: opened(path).__enter__(),
    "headers": read_headers,
    "packed": lambda path: load_(mlp(), path),
    "source": lambda path: TensorFiles(files_in(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, reader: str, kind: str) -> None:
    path = tmp_path / "pipe" if kind == "pipe" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        READERS[reader](path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_in_a_folder(tmp_path: Path, file: str) -> None:
    os.mkfifo(tmp_path / file)
    with pytest.raises(ValueError, match="not a regular file"):
        read_headers(tmp_path)


def test_a_text_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\r\nb\rc")
    assert read_text(path) == "a\nb\nc"
    path.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 3\)"):
        read_text(path)
    with pytest.raises(ValueError, match="larger than 3 bytes"):
        read_bytes(path, 3)


# ---- writing ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from isqtorch.files import writing
target, moment = Path(sys.argv[1]), sys.argv[2]
if moment == "file":
    with writing.replacing(target) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
rename = os.rename
def renamed(old, new):
    rename(old, new)
    if moment == "moved":
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = renamed
with writing.replacing_folder(target, lambda path: True) as folder:
    (folder / "new.txt").write_text("new")
    if moment == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(target: Path, moment: str) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["writing", "moved"])
def test_a_killed_write_of_a_folder(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    killed(target, moment)
    assert len(list(tmp_path.glob(".out.*"))) == 1
    recover(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("mine.txt", "mine")]


def test_a_killed_write_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_text("old")
    killed(target, "file")
    assert len(list(tmp_path.iterdir())) == 2 and target.read_text() == "old"
    with replacing(target) as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"] and target.read_text() == "new"


def test_a_write_in_progress_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    with replacing(target) as one:
        one.write_text("one")
        with replacing(target) as two:
            two.write_text("two")
        assert target.read_text() == "two" and one.exists()
        foreign = tmp_path / ".x.bin.isqtorch-file"
        foreign.write_text("not ours")
    assert target.read_text() == "one" and foreign.read_text() == "not ours"


def test_kept_files_and_failures_of_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name in ("mine.txt", "stale.txt", "both.txt"):
        (target / name).write_text("old")
    (target / "mine.txt").chmod(0o600)
    with pytest.raises(KeyError), replacing_folder(target, lambda path: True) as folder:
        (folder / "both.txt").write_text("new")
        raise KeyError
    assert {path.read_text() for path in target.iterdir()} == {"old"}
    with replacing_folder(target, lambda path: path.name != "stale.txt") as folder:
        (folder / "both.txt").write_text("new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"mine.txt": "old", "both.txt": "new"}
    assert (target / "mine.txt").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_files_are_replaced(tmp_path: Path) -> None:
    """A device or a pipe would become an ordinary file: for the user root, /dev/null of the whole machine."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for place in (pipe, link):
        with pytest.raises(FileExistsError, match=f"{place} exists and is not a file"):
            write_atomically(place, [b"x"])
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode) and link.is_symlink()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_atomically(tmp_path, [b"x"])
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path / 'none'} for"):
        write_atomically(tmp_path / "none" / "x", [b"x"])
    with pytest.raises(FileExistsError, match="is not a file"), replacing(tmp_path / "late") as temporary:
        temporary.write_bytes(b"x")
        os.mkfifo(tmp_path / "late")  # while it was written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "link", "pipe"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'x'}'"), replacing(tmp_path / "x"):
        raise full
    target = tmp_path / "folder"
    with (
        pytest.raises(OSError, match=f"No space left on device: '{target}'"),
        replacing_folder(target, lambda path: False),
    ):
        raise full
    assert not list(tmp_path.iterdir())
