"""Checkpoints in FP8 and MXFP4: packed while they are loaded, taken over as they are, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hf import logits
from moe_models import build
from quantized_folders import fp8_block, fp8_one, fp8_rows, mxfp4, packed, rewrite, same, write
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import isqtorch
from isqtorch import IsqConfig

BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def projections(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and "embed" not in name and "lm_head" not in name and "gate.weight" not in name


def stacks(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 3


def folders(path: Path, kind: str) -> tuple[Path, Path]:
    """(quantized, floats) of a kind of checkpoint."""
    llama = {
        "block": (BLOCK, fp8_block()),
        "small_blocks": ({**BLOCK, "weight_block_size": [64, 32]}, fp8_block(64, 32)),
        "wide_blocks": ({**BLOCK, "weight_block_size": [96, 256]}, fp8_block(96, 256)),
        "rows": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8_rows),
        "one": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_one),
    }
    if kind in llama:
        return write(models.tiny_llama(), path, *llama[kind], projections)
    if kind == "mxfp4":
        return write(build("gpt_oss"), path, {"quant_method": "mxfp4"}, mxfp4, stacks)
    return write(build(kind), path, BLOCK, fp8_block(), projections)


KINDS = ["block", "small_blocks", "wide_blocks", "rows", "one", "mxfp4", "deepseek_v3", "qwen3_moe"]
EXACT = {"block": "fp8", "wide_blocks": "fp8", "rows": "fp8", "one": "fp8", "mxfp4": "mxfp4"}


@pytest.mark.parametrize("fmt", ["q4k", "q8_0", "afq4"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_the_decoded_weights(tmp_path: Path, kind: str, fmt: str) -> None:
    quantized, floats = folders(tmp_path, kind)
    model = packed(quantized, fmt)
    assert same(model, packed(floats, fmt))
    note = next(note for note in model.isq_report.notes if "quantized already" in note)
    assert "0 weights are taken over" in note
    assert any("packed anew" in layer.reason for layer in model.isq_report.layers)


@pytest.mark.parametrize("ask", ["keep", "format"])
@pytest.mark.parametrize("kind", sorted(EXACT))
def test_blocks_are_taken_over(tmp_path: Path, kind: str, ask: str) -> None:
    """Decoded again, they are the values of the checkpoint."""
    quantized, floats = folders(tmp_path, kind)
    model = packed(quantized, "keep" if ask == "keep" else EXACT[kind])
    kept = [layer for layer in model.isq_report.layers if "blocks of the checkpoint" in layer.reason]
    assert len(kept) == (4 if kind == "mxfp4" else 14)
    assert {layer.stored for layer in kept} == {EXACT[kind]}
    exact = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    for layer in kept:
        path, _, leaf = layer.name.rpartition(".")
        stack = path if leaf.endswith("_proj") and kind == "mxfp4" else layer.name
        module = model.get_submodule(stack)
        name = layer.name if stack == path else f"{layer.name}.weight"
        leaf = name.rpartition(".")[2]
        values = torch.ops.isqtorch.dequantize(getattr(module, leaf), layer.stored, torch.float32)
        expected = exact.get_parameter(name)
        assert torch.equal(values, expected.transpose(1, 2) if kind == "mxfp4" else expected), layer.name
    if ask == "keep":
        assert model.isq_report["lm_head"].stored is None
        assert "floats" in model.isq_report["lm_head"].reason


def test_keep_of_what_no_format_holds(tmp_path: Path) -> None:
    """32 columns share a scale: the next better format, and the reason."""
    quantized, floats = folders(tmp_path, "small_blocks")
    model = packed(quantized, "keep")
    row = model.isq_report["model.layers.0.mlp.up_proj"]
    assert row.stored == "q8_0"
    assert "32 columns share a scale" in row.reason
    expected = packed(floats, "q8_0", exclude="lm_head|embed")
    assert same(model, expected)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe"])
def test_experts_are_taken_over(tmp_path: Path, kind: str) -> None:
    """Those whose columns 128 divides: gate and up, of [64, 128]. down has 64 columns."""
    quantized, floats = folders(tmp_path, kind)
    model = packed(quantized, "keep")
    rows = {layer.name: layer for layer in model.isq_report.layers}
    gate = next(name for name in rows if name.endswith("experts.gate_up_proj"))
    down = gate.replace("gate_up", "down")
    assert rows[gate].stored == "fp8"
    assert rows[down].stored == "q8_0"
    assert "64 columns are not a multiple of 128" in rows[down].reason
    exact = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).get_parameter(gate)
    experts = model.get_submodule(gate.rpartition(".")[0])
    assert torch.equal(torch.ops.isqtorch.dequantize(experts.gate_up_proj, "fp8", torch.float32), exact)
    other = packed(floats, "q8_0")
    assert torch.equal(experts.down_proj, other.get_submodule(gate.rpartition(".")[0]).down_proj)
    assert torch.isfinite(logits(model)).all()


def test_576_rows_with_5_rows_of_scales(tmp_path: Path) -> None:
    """kv_a_proj_with_mqa of DeepSeek-V3. transformers takes blocks of 115 rows here, and fails."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=64,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=64,
    )
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():  # rows of different sizes, so that a wrong scale shows
        for layer in model.model.layers:
            layer.self_attn.kv_a_proj_with_mqa.weight *= torch.linspace(1, 8, 576)[:, None]
    quantized, floats = write(model.to(torch.bfloat16), tmp_path, BLOCK, fp8_block(), projections)
    path = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    kept, anew = packed(quantized, "keep"), packed(quantized, "q8_0")
    exact = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).get_submodule(path).weight
    assert kept.isq_report[path].stored == "fp8"
    assert exact.shape == (576, 256)
    assert torch.equal(torch.ops.isqtorch.dequantize(kept.get_submodule(path).weight, "fp8", torch.float32), exact)
    assert same(anew, packed(floats, "q8_0"))


@pytest.mark.parametrize("kind", ["block", "mxfp4", "deepseek_v3"])
@pytest.mark.parametrize("fmt", ["keep", "q4k"])
def test_saved_and_loaded_again(tmp_path: Path, kind: str, fmt: str) -> None:
    quantized, _ = folders(tmp_path, kind)
    model = packed(quantized, fmt)
    model.save_pretrained(tmp_path / "saved")
    entry = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "isq"
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert same(again, model)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["block", "mxfp4", "deepseek_v3"])
def test_requantized_from_the_checkpoint(tmp_path: Path, kind: str) -> None:
    """It is decoded again, as in the first load."""
    quantized, floats = folders(tmp_path, kind)
    model = packed(quantized, "q4k")
    isqtorch.requantize_(model, "q8_0", progress=False)
    assert same(model, packed(floats, "q8_0"))
    isqtorch.requantize_(model, "q5k", source=quantized, progress=False)
    assert same(model, packed(floats, "q5k"))


def test_layers_that_are_left_are_decoded(tmp_path: Path) -> None:
    for kind in ("block", "mxfp4"):
        (tmp_path / kind).mkdir()
        quantized, floats = folders(tmp_path / kind, kind)
        model = packed(quantized, "q4k", exclude=["mlp", "o_proj"])
        assert same(model, packed(floats, "q4k", exclude=["mlp", "o_proj"]))


def test_auto_of_experts(tmp_path: Path) -> None:
    """Measured one by one, as they are decoded."""
    quantized, floats = folders(tmp_path, "mxfp4")
    options: dict[str, Any] = {"target_bpw": 10, "formats": ["q4_0", "q8_0"], "include": "experts"}
    assert same(packed(quantized, "auto", **options), packed(floats, "auto", **options))


def test_a_tied_head(tmp_path: Path) -> None:
    quantized, floats = write(models.tiny_llama(tied=True), tmp_path, BLOCK, fp8_block(), projections)
    model = packed(quantized, "q4k")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(model, packed(floats, "q4k"))
    kept = packed(quantized, "keep")
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    assert kept.lm_head.weight.dtype == torch.bfloat16


def test_a_tied_table_that_is_quantized_itself(tmp_path: Path) -> None:
    quantized, _ = write(
        models.tiny_llama(tied=True), tmp_path, BLOCK, fp8_block(), lambda name, tensor: tensor.dim() == 2
    )
    model = packed(quantized, "keep")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.isq_report["model.embed_tokens"].stored == model.isq_report["lm_head"].stored == "fp8"
    assert torch.isfinite(logits(model)).all()


def test_auto(tmp_path: Path) -> None:
    quantized, floats = folders(tmp_path, "block")
    options: dict[str, Any] = {"target_bpw": 6, "formats": ["q4k", "q8_0"]}
    model = packed(quantized, "auto", **options)
    assert same(model, packed(floats, "auto", **options))
    assert model.isq_report.choice is not None


def fused(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 3


@pytest.mark.parametrize("isq", ["q8_0", "keep"])
def test_stacks_of_experts_in_fp8(tmp_path: Path, isq: str) -> None:
    """As transformers saves them: the stack under its own name, and a stack of scales."""
    quantized, floats = write(build("llama4"), tmp_path, BLOCK, fp8_block(), fused)
    model = packed(quantized, isq)
    row = model.isq_report["model.layers.0.feed_forward.experts.gate_up_proj"]
    if isq == "q8_0":
        assert same(model, packed(floats, isq))
    else:  # [E, K, N]: the scales lie along the output features
        assert row.stored == "q8_0"
        assert "output features last" in row.reason


def e8m0(name: str, weight: Tensor) -> Any:
    """MXFP8: a power of two for 32 weights."""
    groups = weight.reshape(weight.shape[0], -1, 32)
    exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / 448))
    codes = (groups / torch.exp2(exponents)[..., None]).to(torch.float8_e4m3fn)
    values = (codes.float() * torch.exp2(exponents)[..., None]).reshape(weight.shape)
    tensors = {name: codes.reshape(weight.shape), f"{name}_scale_inv": (exponents + 127).to(torch.uint8)}
    return tensors, values


def renamed(suffix: str) -> Any:
    """Block FP8 whose scales have the name that another program gives them."""

    def encode(name: str, weight: Tensor) -> Any:
        tensors, values = fp8_block()(name, weight)
        scales = tensors.pop(f"{name}_scale_inv")
        return {**tensors, f"{name.removesuffix('weight')}{suffix}": scales}, values

    return encode


@pytest.mark.parametrize(
    ("entry", "encode", "stored"),
    [
        ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, e8m0, "q8_0"),
        (BLOCK, renamed("scale"), "fp8"),
        (BLOCK, renamed("qscale_weight"), "fp8"),
        (BLOCK, renamed("weight_scale"), "fp8"),
        ({**BLOCK, "weight_block_size": None}, fp8_block(), "fp8"),
    ],
)
def test_other_names_and_scales(tmp_path: Path, entry: dict[str, Any], encode: Any, stored: str) -> None:
    quantized, floats = write(models.tiny_llama(layers=1), tmp_path, entry, encode, projections)
    assert same(packed(quantized, "q4k"), packed(floats, "q4k"))
    assert packed(quantized, "keep").isq_report["model.layers.0.mlp.up_proj"].stored == stored


# ---- what is damaged, or of another kind -----------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj.weight"


def damage(tensors: dict[str, Tensor], what: str) -> None:
    scale = f"{UP}_scale_inv"
    if what == "no scales":
        del tensors[scale]
    elif what == "another shape":
        tensors[scale] = tensors[scale][:2].clone()  # half of them: 256 rows for each would be blocks, too
    elif what == "another type":
        tensors[scale] = tensors[scale].to(torch.int32)
    elif what == "infinite scale":
        tensors[scale][0, 0] = float("inf")
    elif what == "no number":
        tensors[UP].view(torch.uint8)[0, 0] = 127
    elif what == "negative scale":
        tensors[scale][0, 0] = -1.0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no scales", "the checkpoint has no .*up_proj.weight_scale_inv"),
        ("another shape", r"up_proj.weight_scale_inv is \[2, 2\], which are not the scales of .*\[512, 256\]"),
        ("another type", "up_proj.weight_scale_inv is int32, must be"),
        ("infinite scale", "up_proj.weight_scale_inv has values that are not finite"),
        ("no number", "up_proj"),
    ],
)
@pytest.mark.parametrize("fmt", ["q8_0", "keep"])
def test_damaged(tmp_path: Path, what: str, message: str, fmt: str) -> None:
    quantized, _ = folders(tmp_path, "block")
    rewrite(quantized, lambda tensors: damage(tensors, what))
    with pytest.raises(ValueError, match=message):
        packed(quantized, fmt)


def test_negative_scales(tmp_path: Path) -> None:
    quantized, _ = folders(tmp_path, "block")
    rewrite(quantized, lambda tensors: damage(tensors, "negative scale"))
    with pytest.raises(ValueError, match="negative"):
        packed(quantized, "keep")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(f"{name}_scales"), "has no .*_scales"),
        (
            lambda t, name: t.update({f"{name}_scales": t[f"{name}_scales"][:, :-1].clone()}),
            r"_scales is \[4, 191, 4\]",
        ),
        (
            lambda t, name: t.update({f"{name}_blocks": t[f"{name}_blocks"].float()}),
            "_blocks is float32, must be uint8",
        ),
        (lambda t, name: t.update({f"{name}_blocks": t[f"{name}_blocks"][..., :8].clone()}), r"_blocks is \[.*, 8\]"),
        (lambda t, name: t.update({f"{name}_blocks": t[f"{name}_blocks"][0, 0, 0].clone()}), r"_blocks is \[16\]"),
    ],
)
def test_damaged_mxfp4(tmp_path: Path, change: Any, message: str) -> None:
    quantized, _ = folders(tmp_path, "mxfp4")
    rewrite(quantized, lambda tensors: change(tensors, "model.layers.0.mlp.experts.gate_up_proj"))
    with pytest.raises(ValueError, match=message):
        packed(quantized, "q4k")


def test_an_unknown_method(tmp_path: Path) -> None:
    quantized, _ = folders(tmp_path, "block")
    config = json.loads((quantized / "config.json").read_text())
    for method in ("vptq", "of_tomorrow"):
        config["quantization_config"] = {"quant_method": method}
        (quantized / "config.json").write_text(json.dumps(config))
        with pytest.raises(NotImplementedError, match=f"quantized by '{method}', which is not read here. Known .*fp8"):
            packed(quantized, "q4k")


def test_files_of_pickles(tmp_path: Path) -> None:
    quantized, _ = folders(tmp_path, "block")
    torch.save(load_file(quantized / "model.safetensors"), quantized / "pytorch_model.bin")
    (quantized / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="quantized by fp8, and only safetensors files of such checkpoints are read"):
        packed(quantized, "q4k")


def test_an_entry_without_a_method(tmp_path: Path) -> None:
    quantized, _ = folders(tmp_path, "block")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"group_size": 64, "bits": 4}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no quant_method"):
        packed(quantized, "q4k")


@pytest.mark.parametrize("block", [[0, 128], [128], "128", [128, 1.5]])
def test_an_impossible_block_size(tmp_path: Path, block: Any) -> None:
    quantized, _ = folders(tmp_path, "block")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weight_block_size is .*, must be two positive numbers"):
        packed(quantized, "q4k")


def test_keep_needs_a_quantized_checkpoint(tmp_path: Path) -> None:
    model = models.tiny_llama()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'keep' takes over what a checkpoint has quantized already, and this one"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=IsqConfig("keep"))
    with pytest.raises(ValueError, match="'keep' takes over .*, which quantize_ does not do"):
        isqtorch.quantize_(model, "keep", progress=False)
