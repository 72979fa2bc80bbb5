"""Files of `isqtorch.checkpoint` that do not fit or are damaged: an error, and the model is unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import FusedMoE, mlp, state_bytes, tiny_llama
from safetensors.torch import save_file
from test_checkpoint import rewrite
from torch import nn

from isqtorch.checkpoint import load_, save
from isqtorch.formats import formats, get_format
from isqtorch.inplace.quantize import quantize_


def _set(header: dict, layer: str, **values) -> None:
    header["layers"][layer].update(values)


DAMAGE = {
    "newer": (lambda h, t: h.update(format_version=2), "format_version 2 is newer than 1"),
    "version": (lambda h, t: h.update(format_version="1"), "format_version is '1'"),
    "bool version": (lambda h, t: h.update(format_version=True), "format_version is True"),
    "no layers": (lambda h, t: h.pop("layers"), "must hold 'layers' and 'shared'"),
    "shared list": (lambda h, t: h.update(shared={"a": 1}), "'shared' must map names to names"),
    "layer": (lambda h, t: h["layers"].update({"0": []}), "layer '0': is not an object"),
    "kind": (lambda h, t: _set(h, "0", kind="conv"), "layer '0': unknown kind 'conv'"),
    "format": (lambda h, t: _set(h, "0", format="q9"), "layer '0': unknown format 'q9'"),
    "dtype": (lambda h, t: _set(h, "0", dtype="int8"), "layer '0': unknown dtype 'int8'"),
    "sizes": (lambda h, t: _set(h, "0", in_features=-256), "must be positive numbers"),
    "huge": (lambda h, t: _set(h, "0", in_features=1 << 60), "must be positive numbers"),
    "blocks": (lambda h, t: _set(h, "0", in_features=100), "in_features must be a positive multiple of 256"),
    "other size": (lambda h, t: _set(h, "0", in_features=512), r"0 is \[256, 512\], in the model it is \[256, 256\]"),
    "other kind": (
        lambda h, t: _set(h, "0", kind="embedding"),
        "0 is a packed embedding layer, the model has a Linear",
    ),
    "other format": (
        lambda h, t: _set(h, "0", format="q8_0"),
        r"tensor 0\.weight is U8 \[256, 144\], must be U8 \[256, 272\]",
    ),
    "unknown layer": (
        lambda h, t: h["layers"].update({"9": h["layers"]["0"]}),
        "9 is a packed linear layer, the model has nothing",
    ),
    "missing": (lambda h, t: t.pop("1.weight"), r"the file lacks 1\.weight"),
    "dangling": (lambda h, t: h["shared"].update({"1.weight": "gone"}), r"the file lacks 1\.weight"),
    "unexpected": (lambda h, t: t.update(extra=torch.zeros(1)), "the model does not have, extra"),
    "float weight": (
        lambda h, t: t.update({"0.weight": torch.zeros(256, 144)}),
        r"0\.weight is F32 \[256, 144\], must be U8",
    ),
    "bias shape": (
        lambda h, t: t.update({"0.bias": torch.zeros(5)}),
        r"0\.bias is F32 \[5\], must be torch.float32 \[256\]",
    ),
    "experts text": (lambda h, t: _set(h, "0", experts="x"), "experts is 'x', must be a positive number for experts"),
    "experts list": (lambda h, t: _set(h, "0", experts=[1]), r"experts is \[1\], must be"),
    "experts true": (lambda h, t: _set(h, "0", kind="experts", experts=True), "experts is True, must be"),
    "bias type": (lambda h, t: t.update({"0.bias": torch.zeros(256, dtype=torch.int32)}), r"0\.bias is I32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_change_nothing(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    path = tmp_path / "x.safetensors"
    model, target = mlp(), mlp()
    quantize_(model, 4)
    save(model, path)
    rewrite(path, change)
    before = state_bytes(target)
    with pytest.raises(ValueError, match=message):
        load_(target, path)
    assert state_bytes(target) == before and all(type(layer) is nn.Linear for layer in target)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        load_(mlp(), path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"was not written by isqtorch\.checkpoint\.save"):
        load_(mlp(), path)
    save_file({"a": torch.zeros(1)}, path, {"isqtorch": "{"})
    with pytest.raises(ValueError, match="is not JSON"):
        load_(mlp(), path)
    save_file({"a": torch.zeros(1)}, path, {"isqtorch": "[]"})
    with pytest.raises(ValueError, match="is not an object"):
        load_(mlp(), path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model = mlp(width=64, depth=1)
    quantize_(model, "q8_0")
    save(model, path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load_(mlp(width=64, depth=1), path)


def test_buffers_that_no_file_has(tmp_path: Path) -> None:
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(64, 64)
            self.register_buffer("table", torch.ones(3), persistent=False)

    model = WithTable()
    quantize_(model, "q8_0")
    save(model, tmp_path / "x.safetensors")
    with torch.device("meta"):
        empty = WithTable()
    with pytest.raises(ValueError, match="the buffer table is on the meta device and not part of the state dict"):
        load_(empty, tmp_path / "x.safetensors")


@pytest.mark.parametrize("fmt", formats())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite(tmp_path: Path, fmt: str, value: float) -> None:
    path = tmp_path / "x.safetensors"
    model, target = mlp(depth=2), mlp(depth=2)
    quantize_(model, fmt)
    layout = model[1].packed["weight"]
    part = [part for part in get_format(layout).parts if part.real][-1]
    place = 3 * model[1].weight.shape[1] + part.offset  # the first block of row 3
    bad = torch.full((part.count,), 255 if part.exponents else value, dtype=part.dtype).view(torch.uint8)
    model[1].weight.data.view(-1)[place : place + part.nbytes] = bad
    save(model, path)
    before = state_bytes(target)
    with pytest.raises(ValueError, match=rf"1: row 3 has a {part.name} that is .*check_scales=False"):
        load_(target, path)
    assert state_bytes(target) == before
    load_(target, path, check_scales=False)
    assert state_bytes(target) == state_bytes(model)


@pytest.mark.parametrize(
    ("build", "dim", "where"), [(FusedMoE, 3, "expert 1"), (lambda: tiny_llama(tied=True), 2, "row 1")]
)
def test_scales_of_experts_and_shared_weights(tmp_path: Path, build, dim: int, where: str) -> None:
    path = tmp_path / "x.safetensors"
    model = build()
    quantize_(model, "q8_0")
    save(model, path)
    load_(build(), path)
    packed = next(p for p in model.parameters() if p.dtype == torch.uint8 and p.dim() == dim)
    packed.data[1].view(-1)[:2] = torch.tensor([float("nan")], dtype=torch.float16).view(
        torch.uint8
    )  # q8_0 begins with d
    save(model, path)
    with pytest.raises(ValueError, match=f"{where} has a d that is nan"):
        load_(build(), path)
