"""Checkpoints of bitsandbytes, hqq and NVFP4: packed while they are loaded, and taken over where that is exact."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hf import logits
from moe_models import build
from quantized_folders import packed, rewrite, same, write
from quantized_tables import bnb4, bnb8, hqq, nvfp4
from torch import Tensor
from transformers import AutoModelForCausalLM

import isqtorch

BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
OF_HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}}
CT = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}

# name: (configuration, encoder, the format that holds it, or that is the next better one, reason)
KINDS: dict[str, tuple[dict[str, Any], Any, str, str]] = {
    "nf4": (BNB4, bnb4("nf4"), "q6k", r"no format here has the codes of bitsandbytes \(nf4\)"),
    "nf4_nested": (BNB4, bnb4("nf4", nested=True), "q6k", "no format here"),
    "fp4": ({**BNB4, "quant_method": None}, bnb4("fp4"), "q6k", r"bitsandbytes \(fp4\)"),
    "int8": (BNB8, bnb8, "q8_0", r"bitsandbytes \(int8\)"),
    "hqq4": (OF_HQQ, hqq(4, 64), "hqq4", ""),
    "hqq8": (OF_HQQ, hqq(8, 128), "hqq8g128", ""),
    "hqq2": (OF_HQQ, hqq(2, 32), "hqq4g32", ""),
    "hqq_as_float": (OF_HQQ, hqq(4, 64, as_float=True), "hqq4", ""),
    "hqq_axis0": (OF_HQQ, hqq(3, 64, axis=0), "q5k", "not runs of columns"),
    "hqq_group_of_16": (OF_HQQ, hqq(4, 16), "q6k", "groups of 16 columns are no blocks"),
    "nvfp4": (CT, nvfp4(divides=True), "q6k", r"compressed-tensors \(nvfp4\)"),
    "modelopt": (MODELOPT, nvfp4(divides=False), "q6k", r"modelopt \(nvfp4\)"),
}


def projections(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and "embed" not in name and "lm_head" not in name and "gate.weight" not in name


def folders(path: Path, kind: str, model: Callable[[], Any] = models.tiny_llama) -> tuple[Path, Path]:
    entry, encode, *_ = KINDS[kind]
    return write(model(), path, entry, encode, projections)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_anew_and_taken_over(tmp_path: Path, kind: str) -> None:
    quantized, floats = folders(tmp_path, kind)
    fmt, why = KINDS[kind][2:]
    assert same(packed(quantized, "q4k"), packed(floats, "q4k"))
    model = packed(quantized, "keep")
    rows = [layer for layer in model.isq_report.layers if layer.name.endswith("proj")]
    assert {layer.stored for layer in rows} == {fmt}
    if why:
        assert re.search(why, rows[0].reason), rows[0].reason
        assert same(model, packed(floats, fmt, exclude="lm_head|embed"))
    else:
        exact = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
        for layer in rows:
            blocks = model.get_submodule(layer.name).weight
            values = torch.ops.isqtorch.dequantize(blocks, fmt, torch.float32)
            assert torch.equal(values, exact.get_submodule(layer.name).weight), layer.name
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(again, model)
    assert torch.equal(logits(again), logits(model))
    isqtorch.requantize_(model, "q8_0", source=quantized, exclude="lm_head|embed", progress=False)
    assert same(model, packed(floats, "q8_0", exclude="lm_head|embed"))


@pytest.mark.parametrize("kind", ["nf4", "hqq4", "modelopt"])
def test_experts(tmp_path: Path, kind: str) -> None:
    quantized, floats = folders(tmp_path, kind, lambda: build("qwen3_moe"))
    for fmt in ("q8_0", "keep"):
        model = packed(quantized, fmt)
        expected = packed(floats, fmt if fmt != "keep" else "q6k", exclude="lm_head|embed" if fmt == "keep" else None)
        if kind == "hqq4" and fmt == "keep":
            assert model.isq_report["model.layers.0.mlp.experts.down_proj"].stored == "hqq4"
        else:
            assert same(model, expected)


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq4"])
def test_transposed_layers(tmp_path: Path, kind: str) -> None:
    """GPT-2 has its weights with the output features last; these methods store them first."""
    entry, encode, *_ = KINDS[kind]

    def turned(name: str, weight: Tensor) -> Any:
        tensors, values = encode(name, weight.t().contiguous())
        return tensors, values.t().contiguous()

    def chosen(name: str, tensor: Tensor) -> bool:
        return ".c_" in name and tensor.dim() == 2

    quantized, floats = write(models.tiny_gpt2(), tmp_path, entry, turned, chosen)
    for options in ({}, {"exclude": "mlp"}):
        assert same(packed(quantized, "q8_0", **options), packed(floats, "q8_0", **options))
    model = packed(quantized, "q4k")
    isqtorch.requantize_(model, "q8_0", progress=False)
    assert same(model, packed(floats, "q8_0"))
    if kind == "hqq4":
        kept = packed(quantized, "keep")
        layer = kept.transformer.h[0].attn.c_proj
        exact = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).transformer.h[0].attn.c_proj.weight
        assert torch.equal(torch.ops.isqtorch.dequantize(layer.weight, "hqq4", torch.float32), exact.t())


# ---- what is damaged, or of another kind -----------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"
HALF = UP.removesuffix("weight")


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


DAMAGES: list[tuple[str, Callable[[dict[str, Tensor]], Any], type[Exception], str]] = [
    ("nf4", lambda t: t.pop(STATE), ValueError, "has no .*quant_state.bitsandbytes__nf4"),
    ("nf4", lambda t: t.pop(f"{UP}.absmax"), ValueError, "has no .*absmax"),
    ("nf4", lambda t: t.pop(UP), ValueError, "and no .*up_proj.weight"),
    ("nf4", lambda t: t.update({STATE: text("{")}), ValueError, "is no JSON"),
    ("nf4", lambda t: t.update({STATE: text("[" * 30000)}), ValueError, "is no JSON"),
    ("nf4", lambda t: t.update({STATE: text("[1]")}), ValueError, "must be an object"),
    ("nf4", lambda t: t.update({STATE: text('{"shape": [2, 2]}')}), ValueError, "no valid shape, blocksize"),
    (
        "nf4",
        lambda t: t.update({STATE: text('{"shape": [999999999, 999999999], "blocksize": 64}')}),
        ValueError,
        r"weight is \[65536, 1\], must be",
    ),
    ("nf4", lambda t: t.update({f"{UP}.absmax": torch.ones(3)}), ValueError, r"absmax is \[3\], must be \[2048\]"),
    ("nf4", lambda t: t.update({f"{UP}.quant_map": torch.ones(4)}), ValueError, r"quant_map is \[4\]"),
    ("nf4_nested", lambda t: t.pop(f"{UP}.nested_quant_map"), ValueError, "has no .*nested_quant_map"),
    ("nf4_nested", lambda t: t.pop(f"{UP}.nested_absmax"), ValueError, "absmax is uint8, must be float32"),
    ("int8", lambda t: t.pop(f"{HALF}SCB"), ValueError, "has no .*SCB"),
    ("int8", lambda t: t[f"{HALF}weight_format"].fill_(2), NotImplementedError, "only rows are read"),
    ("hqq4", lambda t: t.pop(f"{HALF}scale"), ValueError, "has no .*scale"),
    ("hqq4", lambda t: t.pop(f"{HALF}shape"), ValueError, "has no .*shape"),
    ("hqq4", lambda t: t[f"{HALF}shape"].fill_(-1), ValueError, "impossible"),
    ("hqq4", lambda t: t[f"{HALF}shape"].fill_(512), ValueError, r"W_q is \[1024, 64\], must be"),
    ("hqq4", lambda t: t[f"{HALF}axis"].fill_(3), ValueError, "along axis 3 is impossible"),
    ("hqq4", lambda t: t[f"{HALF}quant_zero"].fill_(1), NotImplementedError, "quantized too"),
    ("hqq4", lambda t: t.update({f"{HALF}packing": text("5bit_u8")}), NotImplementedError, "packing '5bit_u8'"),
    ("hqq4", lambda t: t[f"{HALF}zero"].fill_(float("inf")), ValueError, "zero points that are not finite"),
    ("nvfp4", lambda t: t.pop(f"{UP}_scale"), ValueError, "has no .*weight_scale"),
    ("nvfp4", lambda t: t[f"{UP}_global_scale"].fill_(0), ValueError, "global_scale is 0.0"),
    ("nvfp4", lambda t: t.update({f"{UP}_scale": torch.ones(512, 8)}), ValueError, r"weight_scale is \[512, 8\]"),
]


@pytest.mark.parametrize(("kind", "change", "error", "message"), DAMAGES)
def test_damaged(
    tmp_path: Path, kind: str, change: Callable[[dict[str, Tensor]], Any], error: type[Exception], message: str
) -> None:
    quantized, _ = folders(tmp_path, kind, lambda: models.tiny_llama(layers=1))
    rewrite(quantized, change)
    with pytest.raises(error, match=message):
        packed(quantized, "q4k")
