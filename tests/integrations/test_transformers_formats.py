"""Packed checkpoints whose config.json names other formats than the bytes are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hf import load, logits
from safetensors.torch import load_file, save_file

import isqtorch
from isqtorch.modules.plausible import SWITCH

pytest.importorskip("transformers")
UP = "model.layers.1.mlp.up_proj"


def saved(folder: Path, fmt: str, model: Any = None, **options: Any) -> Any:
    model = models.tiny_llama(dtype=torch.float32) if model is None else model
    isqtorch.quantize_(model, fmt, progress=False, **options)
    model.save_pretrained(folder)
    return model


def edit(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    layers = config["quantization_config"]["layers"]
    config["quantization_config"]["layers"] = {name: change(name, fmt) for name, fmt in layers.items()}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("stored", "told"), [("q4k", "q4_0"), ("afq4", "hqq4"), ("hqq4", "afq4"), ("q5_0", "afq5")])
def test_one_edited_format(stored: str, told: str, tmp_path: Path) -> None:
    saved(tmp_path, stored)
    edit(tmp_path, lambda name, fmt: told if name == UP else fmt)
    with pytest.raises(
        ValueError, match=rf"{UP} is packed as {told}, and its bytes are not: read as {told}, .*{SWITCH}=0"
    ):
        load(tmp_path)


def test_the_config_of_another_model(tmp_path: Path) -> None:
    saved(tmp_path / "one", "q4k", include="layers")
    saved(tmp_path / "two", "afq4", include="layers")
    (tmp_path / "one" / "config.json").write_bytes((tmp_path / "two" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"packed as afq., and its bytes are not"):
        load(tmp_path / "one")


def test_tables_and_experts_are_checked_too(tmp_path: Path) -> None:
    saved(tmp_path / "table", "q8_0")
    edit(tmp_path / "table", lambda name, fmt: "afq8" if name == "model.embed_tokens" else fmt)
    with pytest.raises(ValueError, match="model.embed_tokens is packed as afq8"):
        load(tmp_path / "table")
    saved(tmp_path / "experts", "afq4g32", models.tiny_moe())
    edit(tmp_path / "experts", lambda name, fmt: "hqq4g32" if name.endswith("experts.down_proj") else fmt)
    with pytest.raises(ValueError, match=r"experts\.down_proj is packed as hqq4g32"):
        load(tmp_path / "experts")


def test_scales_that_are_nan(tmp_path: Path) -> None:
    saved(tmp_path, "q8_0")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{UP}.weight"][:, :2] = 255  # the first scale of every row
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{UP} is packed as q8_0, .* of 'd' are NaN or infinite"):
        load(tmp_path)


def test_the_check_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "q4k")
    edit(tmp_path, lambda name, fmt: "q4_0" if name == UP else fmt)
    monkeypatch.setenv(SWITCH, "0")
    assert load(tmp_path).get_submodule(UP).format == "q4_0"


@pytest.mark.parametrize("fmt", ["q4_0", "q4k", "q6k", "q8_0", "afq4", "hqq4", "fp8"])
def test_an_honest_config_loads(fmt: str, tmp_path: Path) -> None:
    model = saved(tmp_path, fmt)
    assert torch.equal(logits(load(tmp_path)), logits(model))
