"""Quantized checkpoints that two processes load together."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from moe_models import build
from quantized_folders import fp8_block, mxfp4, write
from quantized_integers import compressed
from torch import Tensor
from two_processes import run_two

BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}


def projections(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and "embed" not in name and "lm_head" not in name and "gate.weight" not in name


@pytest.mark.skipif(torch.__version__ < "2.12", reason="experts are spread from torch 2.12 on")
def test_each_process_has_its_share(tmp_path: Path) -> None:
    for name in ("fp8", "int4", "experts", "mxfp4"):
        (tmp_path / name).mkdir()
    write(models.tiny_llama(), tmp_path / "fp8", BLOCK, fp8_block(), projections)
    write(models.tiny_llama(), tmp_path / "int4", INT4, compressed(4, 32), projections)
    write(build("qwen3_moe"), tmp_path / "experts", INT4, compressed(4, 32), projections)
    write(build("gpt_oss"), tmp_path / "mxfp4", {"quant_method": "mxfp4"}, mxfp4, lambda _, tensor: tensor.dim() == 3)
    lines = run_two(Path(__file__).with_name("stored_worker.py"), str(tmp_path), timeout=300).splitlines()
    kept = {"fp8": 14, "int4": 14, "experts": 12, "mxfp4": 4}
    expected = [
        f"{name} {fmt} equal spread {count if fmt == 'keep' else 0}"
        for name, count in kept.items()
        for fmt in ("keep", "q8_0")
    ]
    assert lines == expected
