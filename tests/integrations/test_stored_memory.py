"""What loading a quantized checkpoint takes: the packed model, and one decoded weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_llama, write_moe

HERE = Path(__file__).resolve().parent
SMALL = 32 << 20  # code and tables of a first load, which have nothing to do with the model's size

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def quantize_files(folder: Path) -> int:
    """Turn the projections of a checkpoint into block FP8, file by file; returns the bytes of all files."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if "proj" in name]:
            rows, columns = tensors[name].shape
            blocks = tensors[name].float().view(rows // 128, 128, columns // 128, 128)
            scales = blocks.abs().amax((1, 3)) / 448
            codes = (blocks / scales[:, None, :, None]).view(rows, columns)
            tensors[name], tensors[f"{name}_scale_inv"] = codes.to(torch.float8_e4m3fn), scales
        save_file(tensors, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():  # the loader reads the names in the files, and only the files from here
        files = {path.name: path for path in folder.glob("*.safetensors")}
        mapping = {name: file for file, path in files.items() for name in load_file(path)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def taken(folder: Path, fmt: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "load_memory.py"), str(folder), fmt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(folder: Path, decoded: int) -> None:
    """The peak is the packed model and some copies of a weight of `decoded` bytes in float32."""
    for fmt in ("keep", "q8_0", "q4k"):
        found = taken(folder, fmt)
        assert found["peak_anonymous"] < 1.02 * found["size"] + 1.5 * decoded + SMALL, (fmt, found)
        assert found["peak"] < 1.05 * found["size"] + 2 * decoded + SMALL, (fmt, found)


def test_peak(tmp_path: Path) -> None:
    """If layers, the files or holes between weights stayed in memory, it would be 100 MB and more."""
    write_llama(tmp_path, 3, "200MB")
    assert quantize_files(tmp_path) > 230e6
    check(tmp_path, 4 * 2048 * 8192)
    write_moe(tmp_path / "moe", 4)
    assert quantize_files(tmp_path / "moe") > 150e6
    check(tmp_path / "moe", 4 * 512 * 1024)


@pytest.mark.slow  # writes 3 GB
def test_peak_of_a_gigabyte(tmp_path: Path) -> None:
    write_llama(tmp_path, 15)
    assert quantize_files(tmp_path) > 1.03e9
    check(tmp_path, 4 * 2048 * 8192)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
