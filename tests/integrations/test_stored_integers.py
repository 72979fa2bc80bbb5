"""Checkpoints of compressed-tensors, GPTQ and AWQ: packed while they are loaded, and taken over as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hf import logits
from moe_models import build
from quantized_folders import fp8_rows, packed, rewrite, same, write
from quantized_integers import awq, compressed, compressed_bytes, gptq, torchao_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import isqtorch


def scheme(bits: int, group: int, kind: str, format: str = "pack-quantized", symmetric: bool = True) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "group_size": group or None,
        "strategy": "group" if group else "channel",
        "dynamic": False,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def of_gptq(bits: int, group: int, **options: Any) -> dict[str, Any]:
    entry = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False}
    return {**entry, "checkpoint_format": "gptq", **options}


OF_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True, "backend": "auto"}

# name: (configuration, encoder, the format that holds it)
KINDS: dict[str, tuple[dict[str, Any], Any, str | None]] = {
    "int4": (scheme(4, 128, "int"), compressed(4, 128), "hqq4g128"),
    "int4_g32_zeros": (scheme(4, 32, "int", symmetric=False), compressed(4, 32, False), "hqq4g32"),
    "int4_rows": (scheme(4, 0, "int"), compressed(4, 0), "hqq4g128"),
    "int3": (scheme(3, 64, "int"), compressed(3, 64), "hqq4"),
    "int8": (scheme(8, 64, "int"), compressed(8, 64), "hqq8"),
    "int8_f32": (scheme(8, 64, "int"), compressed(8, 64, scale=torch.float32), None),
    "bytes": (scheme(8, 0, "int", "int-quantized"), compressed_bytes, "hqq8g128"),
    "fp8": (scheme(8, 0, "float", "float-quantized"), fp8_rows, "fp8"),
    "gptq": (of_gptq(4, 128), gptq(4, 128), "hqq4g128"),
    "gptq_g64": (of_gptq(4, 64), gptq(4, 64, index=False), "hqq4"),
    "gptq_v2": (of_gptq(4, 32, checkpoint_format="gptq_v2"), gptq(4, 32, less_one=False), "hqq4g32"),
    "gptq_8": (of_gptq(8, 32), gptq(8, 32), "hqq8g32"),
    "gptq_3": (of_gptq(3, 128), gptq(3, 128), "hqq4g128"),
    "gptq_2": (of_gptq(2, 64), gptq(2, 64), "hqq4"),
    "gptq_act_order": (of_gptq(4, 64, desc_act=True), gptq(4, 64, act_order=True), None),
    "awq": (OF_AWQ, awq(128), "hqq4g128"),
    "auto_round": (
        of_gptq(4, 64, quant_method="auto-round", packing_format="auto_round:auto_gptq"),
        gptq(4, 64),
        "hqq4",
    ),
    "torchao": ({"quant_method": "torchao", "quant_type": {}}, torchao_bytes, "hqq8"),
    "awq_g32": ({**OF_AWQ, "group_size": 32}, awq(32), "hqq4g32"),
}
INSTEAD = {"gptq_act_order": "q6k", "int8_f32": "q8_0"}
WHY = {"gptq_act_order": "scattered", "int8_f32": "scales are no numbers of f16"}


def projections(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and "embed" not in name and "lm_head" not in name and "gate.weight" not in name


def folders(path: Path, kind: str, model: Callable[[], Any] = models.tiny_llama) -> tuple[Path, Path]:
    entry, encode, _ = KINDS[kind]
    return write(model(), path, entry, encode, projections)


def values_of(model: Any, layer: Any) -> Tensor:
    return torch.ops.isqtorch.dequantize(model.get_submodule(layer.name).weight, layer.stored, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_anew_and_taken_over(tmp_path: Path, kind: str) -> None:
    quantized, floats = folders(tmp_path, kind)
    for fmt in ("q4k", "q8_0"):
        assert same(packed(quantized, fmt), packed(floats, fmt)), fmt
    model, fmt = packed(quantized, "keep"), KINDS[kind][2]
    rows = [layer for layer in model.isq_report.layers if layer.name.endswith("proj")]
    assert {layer.stored for layer in rows} == {fmt or INSTEAD[kind]}
    if fmt is None:
        assert all(WHY[kind] in layer.reason for layer in rows)
        expected = packed(floats, INSTEAD[kind], exclude="lm_head|embed")
        assert same(model, expected)
        return
    exact = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    for layer in rows:
        assert "blocks of the checkpoint" in layer.reason
        assert torch.equal(values_of(model, layer), exact.get_submodule(layer.name).weight), layer.name
    asked = packed(quantized, fmt)
    assert all(
        torch.equal(asked.get_submodule(layer.name).weight, model.get_submodule(layer.name).weight) for layer in rows
    )
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(again, model)
    assert torch.equal(logits(again), logits(model))
    isqtorch.requantize_(model, "q5k", source=quantized, progress=False)
    assert same(model, packed(floats, "q5k"))


def test_other_formats_that_hold_the_same(tmp_path: Path) -> None:
    """Groups of 128 are pairs of groups of 64, and four bits fit into eight."""
    quantized, floats = folders(tmp_path, "awq")
    exact = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    for fmt in ("hqq4", "hqq4g32", "hqq8g128", "hqq8"):
        model = packed(quantized, fmt)
        row = model.isq_report["model.layers.1.mlp.down_proj"]
        assert row.stored == fmt
        assert "blocks of the checkpoint" in row.reason
        assert torch.equal(values_of(model, row), exact.get_submodule(row.name).weight)


def test_classes_of_torchao(tmp_path: Path) -> None:
    """The class of a tensor is in the metadata."""
    quantized, _ = folders(tmp_path, "torchao", lambda: models.tiny_llama(layers=1))
    path, name = quantized / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)

    def describe(text: str) -> None:
        save_file(tensors, path, {"format": "pt", name: text})

    describe(json.dumps({"_type": "Int8Tensor"}))
    packed(quantized, "q4k")
    describe(json.dumps({"_type": "Int4Tensor"}))
    with pytest.raises(
        NotImplementedError, match="torchao's Int4Tensor of int8 is not read, only Float8Tensor, Int8Tensor"
    ):
        packed(quantized, "q4k")
    for text in ("[", "3", json.dumps({"_type": 1})):
        describe(text)
        with pytest.raises(ValueError, match="no description of a tensor"):
            packed(quantized, "q4k")
    tensors["model.layers.0.mlp.gate_proj.weight:_data"] = torch.zeros(2, 2)
    describe(json.dumps({"_type": "Int8Tensor"}))
    with pytest.raises(NotImplementedError, match="older layout"):
        packed(quantized, "q4k")


@pytest.mark.parametrize("kind", ["int4", "gptq_g64", "awq_g32"])
def test_experts(tmp_path: Path, kind: str) -> None:
    """Matrices of single experts are joined; groups of 128 do not divide 64 columns of down_proj."""
    entry, encode, fmt = KINDS[kind]

    def chosen(name: str, tensor: Tensor) -> bool:
        return projections(name, tensor) and (kind != "int4" or "down_proj" not in name)

    quantized, floats = write(build("qwen3_moe"), tmp_path, entry, encode, chosen)
    assert same(packed(quantized, "q4_0"), packed(floats, "q4_0"))
    model = packed(quantized, "keep")
    row = model.isq_report["model.layers.0.mlp.experts.gate_up_proj"]
    if kind == "int4":  # no mix of packed and float stacks
        assert row.stored is None
        assert "down_proj of the same experts stays as it is" in row.reason
        return
    assert row.stored == fmt
    exact = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        stack = getattr(model.model.layers[0].mlp.experts, leaf)
        assert torch.equal(torch.ops.isqtorch.dequantize(stack, fmt, torch.float32), exact.get_parameter(name))


def test_a_mix_of_methods_in_one_checkpoint(tmp_path: Path) -> None:
    """compressed-tensors: experts of int4, attention in FP8, as the configuration lists them."""
    entry = scheme(4, 32, "int", "mixed-precision")
    entry["config_groups"]["group_1"] = {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "type": "float"}}

    def encode(name: str, weight: Tensor) -> Any:
        return (fp8_rows if "self_attn" in name else compressed(4, 32))(name, weight)

    quantized, floats = write(models.tiny_llama(), tmp_path, entry, encode, projections)
    assert same(packed(quantized, "q4k"), packed(floats, "q4k"))
    report = packed(quantized, "keep").isq_report
    assert report["model.layers.0.self_attn.q_proj"].stored == "fp8"
    assert report["model.layers.0.mlp.up_proj"].stored == "hqq4g32"
    assert any("4 bits, groups of 32" in note and "a scale for each row" in note for note in report.notes)


# ---- what is damaged, or of another kind -----------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj."

DAMAGES: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("int4", lambda t: t.pop(f"{UP}weight_scale"), "has no .*weight_scale"),
    ("int4", lambda t: t.pop(f"{UP}weight_shape"), "has no .*weight_shape"),
    ("int4", lambda t: t[f"{UP}weight_shape"].fill_(512), r"says \[512, 512\]|does not go with|in 32 words"),
    ("int4", lambda t: t[f"{UP}weight_shape"].fill_(-4), "says"),
    ("int4", lambda t: t.update({f"{UP}weight_packed": t[f"{UP}weight_packed"].long()}), "weight_packed is int64"),
    ("int4", lambda t: t.update({f"{UP}weight_packed": t[f"{UP}weight_packed"][:, :9].clone()}), "in 9 words"),
    ("int4", lambda t: t[f"{UP}weight_scale"].fill_(float("nan")), "scales that are not finite"),
    (
        "int4",
        lambda t: t.update({f"{UP}weight_scale": t[f"{UP}weight_scale"][:5].clone()}),
        r"weight_scale is \[5, 2\]",
    ),
    ("bytes", lambda t: t.pop(f"{UP}weight_scale"), "has no .*weight_scale"),
    ("gptq", lambda t: t.pop(f"{UP}qzeros"), "has no .*qzeros"),
    ("gptq", lambda t: t.pop(f"{UP}scales"), "has no .*scales"),
    ("gptq", lambda t: t[f"{UP}g_idx"].fill_(7), "a column is in a group that does not exist"),
    ("gptq", lambda t: t.update({f"{UP}g_idx": t[f"{UP}g_idx"][:7].clone()}), r"g_idx is \[7\]"),
    ("gptq", lambda t: t.update({f"{UP}qweight": t[f"{UP}qweight"].float()}), "qweight is float32, must be int32"),
    ("gptq", lambda t: t.update({f"{UP}qzeros": t[f"{UP}qzeros"][:, :3].clone()}), r"qzeros is \[2, 3\]"),
    ("awq", lambda t: t.pop(f"{UP}scales"), "has no .*scales"),
    ("awq", lambda t: t.update({f"{UP}scales": t[f"{UP}scales"][:, :8].clone()}), r"scales is \[2, 8\]"),
    ("awq", lambda t: t.update({f"{UP}weight": torch.zeros(512, 256)}), "is in the checkpoint twice"),
]


@pytest.mark.parametrize(("kind", "change", "message"), DAMAGES)
def test_damaged(tmp_path: Path, kind: str, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    quantized, _ = folders(tmp_path, kind, lambda: models.tiny_llama(layers=1))
    rewrite(quantized, change)
    for fmt in ("q4k", "keep"):
        with pytest.raises(ValueError, match=message):
            packed(quantized, fmt)


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("int4", {"format": "marlin-24"}, NotImplementedError, "format 'marlin-24' are not read, only pack-quantized"),
        ("int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, NotImplementedError, "sparse weights"),
        ("int4", {"transform_config": {"a": 1}}, NotImplementedError, "transforms"),
        ("int4", {"config_groups": [1]}, ValueError, "config_groups must map"),
        ("int4", {"config_groups": {"a": {"weights": 3}}}, ValueError, "must be a scheme"),
        ("int4", {"config_groups": {}}, ValueError, "no number of bits"),
        ("gptq", {"bits": 5}, ValueError, "bits is 5, must be 2 or 3 or 4 or 8"),
        ("gptq", {"bits": None}, ValueError, "bits is None"),
        ("gptq", {"checkpoint_format": "bitblas"}, NotImplementedError, "format 'bitblas' is not read, only 'gptq'"),
        ("gptq", {"pack_dtype": "int8"}, NotImplementedError, "words of int8"),
        ("awq", {"version": "gemv"}, NotImplementedError, "version 'gemv' is not read, only 'gemm'"),
        (
            "auto_round",
            {"packing_format": "auto_round"},
            NotImplementedError,
            "packing 'auto_round' is not read, only auto",
        ),
        ("awq", {"bits": 3}, ValueError, "bits is 3, must be 4"),
    ],
)
def test_other_ways_of_the_same_methods(
    tmp_path: Path, kind: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    quantized, _ = folders(tmp_path, kind, lambda: models.tiny_llama(layers=1))
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] |= change
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        packed(quantized, "q4k")
