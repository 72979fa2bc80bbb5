"""Opening folders of MLX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from mlx_folders import affine, converted, write
from torch import Tensor
from transformers import AutoModelForCausalLM

import isqtorch
from isqtorch.formats import get_format
from isqtorch.integrations.checkpoints.assemble import assemble
from isqtorch.integrations.checkpoints.mlx.checkpoint import MlxCheckpoint
from isqtorch.modules.convert import owner_of
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request
from tests.models import logits, tiny_gpt2, tiny_llama, tiny_moe
from tests.tiny_decoders import tiny

CPU = torch.device("cpu")
BF16, F16 = torch.bfloat16, torch.float16
FOUR = {"group_size": 64, "bits": 4}


def llama(**options: Any) -> Any:
    return tiny_llama(dtype=torch.float32, **options)


def empty(checkpoint: MlxCheckpoint) -> Any:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(checkpoint.config(), dtype=torch.float32).eval()


def opened(folder: Path, request: Request | None = None) -> tuple[Any, Any]:
    checkpoint = MlxCheckpoint(folder)
    model = empty(checkpoint)
    return model, assemble(model, checkpoint, request, CPU)


def meaning(model: Any, meant: dict[str, Tensor]) -> Any:
    """A float model with these values, under the model's own names."""
    missing, unexpected = model.load_state_dict(meant, strict=False)
    assert not unexpected and set(missing) <= set(model.all_tied_weights_keys)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_folder_in_the_layout_of_mlx_lm(
    bits: int, group: int, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    source, entry = llama(tied=tied), {"bits": bits, "group_size": group}
    tensors, meant = converted(source, lambda path: entry, dtype)
    model, report = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=entry))
    fmt = f"afq{bits}g{group}.{'f16' if dtype is F16 else 'bf16'}"
    for name, layer in model.named_modules():
        if hasattr(layer, "format"):
            assert layer.format == get_format(fmt).name
            assert torch.equal(layer.dequantize(), meant.get(f"{name}.weight", meant["model.embed_tokens.weight"]))
    assert len(report.quantized) == 16 - tied and not report.notes
    expected = logits(meaning(source, meant))
    assert (logits(model) - expected).norm() < 0.03 * expected.norm()  # the kernels round x to int8
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_layers_with_an_entry_of_their_own(tmp_path: Path) -> None:
    source = llama()
    own: dict[str, Any] = {
        "model.embed_tokens": {"group_size": 32, "bits": 6},
        "lm_head": {"group_size": 32, "bits": 8, "mode": "affine"},
        "model.layers.0.mlp.down_proj": False,
    }
    tensors, _ = converted(source, lambda path: own.get(path, FOUR) or None)
    quantization = FOUR | {"mode": "affine"} | own
    model, _ = opened(
        write(tmp_path, tensors, source.config.to_dict(), quantization=quantization, quantization_config=quantization)
    )
    assert model.model.embed_tokens.format == "afq6g32"
    assert model.lm_head.format == "afq8g32"
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, source.model.layers[0].mlp.down_proj.weight)
    assert model.model.layers[1].mlp.down_proj.format == "afq4"
    assert not hasattr(model.config, "quantization")


def test_modules_without_an_entry_have_the_setting_that_their_shapes_give(tmp_path: Path) -> None:
    source = llama()
    eight = {"group_size": 32, "bits": 8}  # 8 * 32 = 4 * 64: only the columns of the model tell them apart
    tensors, _ = converted(source, lambda path: eight if "mlp" in path else FOUR)
    model, _ = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=FOUR))
    assert model.model.layers[0].mlp.down_proj.format == "afq8g32"
    assert model.model.layers[0].self_attn.q_proj.format == "afq4"


def test_quantization_config_alone_is_enough(tmp_path: Path) -> None:
    source = llama()
    tensors, _ = converted(source, lambda path: FOUR)
    model, _ = opened(write(tmp_path, tensors, source.config.to_dict(), quantization_config=FOUR))
    assert model.lm_head.format == "afq4"


def test_a_float_folder_gives_a_float_model(tmp_path: Path) -> None:
    source = llama(tied=True)
    tensors, _ = converted(source, lambda path: None)
    model, report = opened(write(tmp_path, tensors, source.config.to_dict()))
    assert torch.equal(logits(model), logits(source))
    assert not report.quantized


@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_of_one_bit_are_kept_in_two(group: int, tmp_path: Path) -> None:
    source, entry = llama(), {"bits": 1, "group_size": group}
    tensors, meant = converted(source, lambda path: entry)
    model, report = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=entry))
    name = "model.layers.0.mlp.up_proj"
    layer, _ = owner_of(model, name)
    assert layer.format == get_format(f"afq2g{group}").name
    assert torch.equal(layer.dequantize(), meant[f"{name}.weight"])
    assert "1-bit codes in the file" in report[name].reason


@pytest.mark.parametrize(("scales", "biases"), [(torch.float32, torch.float32), (BF16, F16)], ids=["f32", "mixed"])
def test_scales_of_other_types_are_rounded(scales: torch.dtype, biases: torch.dtype, tmp_path: Path) -> None:
    source, entry = llama(), {"bits": 4, "group_size": 64}
    tensors, meant = converted(source, lambda path: entry, torch.float32)
    for name, tensor in tensors.items():
        if name.endswith((".scales", ".biases")):
            tensors[name] = tensor.to(scales if name.endswith(".scales") else biases)
    folder = write(tmp_path, tensors, source.config.to_dict(), quantization=entry)
    model, report = opened(folder)
    name = "model.layers.0.mlp.up_proj"
    layer, _ = owner_of(model, name)
    assert layer.format == "afq4.f16"
    assert "which blocks round to F16" in report[name].reason
    wanted = meant[f"{name}.weight"]
    # a bf16 scale is off by 0.2 % on average, which is the test's own rounding
    assert (layer.dequantize() - wanted).norm() < (0.001 if scales is torch.float32 else 0.005) * wanted.norm()


def test_scales_beyond_float16_are_an_error(tmp_path: Path) -> None:
    source, entry = llama(), {"bits": 4, "group_size": 64}
    tensors, _ = converted(source, lambda path: entry, torch.float32)
    tensors["model.layers.0.mlp.up_proj.scales"][3, 1] = 1e5
    with pytest.raises(ValueError, match=r"up_proj: a scale is not finite in torch\.float16"):
        opened(write(tmp_path, tensors, source.config.to_dict(), quantization=entry))


def mantissa_and_exponent(mode: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes and scales of a mode without biases, and the values that they mean."""
    torch.manual_seed(0)
    group, scale_low, scale_high = {"mxfp4": (32, 118, 128), "mxfp8": (32, 110, 118), "nvfp4": (16, 40, 100)}[mode]
    scales = torch.randint(scale_low, scale_high, (rows, columns // group), dtype=torch.uint8)
    if mode == "mxfp8":
        codes = (
            torch.randint(0, 0x7F, (rows, columns), dtype=torch.uint8)
            | torch.randint(0, 2, (rows, columns)).byte() << 7
        )
        packed, values = codes, codes.view(torch.float8_e4m3fn).float()
    else:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4  # the first in the low nibble
        sign, magnitude = codes >> 3, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(codes & 7).int()]
        values = torch.where(sign == 1, -magnitude, magnitude)
    factors = scales.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else 2.0 ** (scales.float() - 127)
    meant = values * factors.repeat_interleave(group, 1)
    return {"weight": packed.contiguous().view(torch.uint32), "scales": scales}, meant


@pytest.mark.parametrize("entry", [True, False], ids=["entry", "inferred"])
@pytest.mark.parametrize(
    ("mode", "fmt", "bound"), [("mxfp4", "mxfp4", 0.0), ("nvfp4", "q6k", 0.03), ("mxfp8", "q8_0", 0.01)]
)
def test_floating_point_modes(mode: str, fmt: str, bound: float, entry: bool, tmp_path: Path) -> None:
    source, path = llama(), "model.layers.0.mlp.up_proj"
    tensors, _ = converted(source, lambda each: None if each == path else FOUR)
    parts, meant = mantissa_and_exponent(mode, 512, 256)
    tensors |= {f"{path}.{leaf}": part for leaf, part in parts.items()}
    group, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    own = {path: {"group_size": group, "bits": bits, "mode": mode}} if entry else {}
    model, report = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=FOUR | own))
    layer, _ = owner_of(model, path)
    assert layer.format == fmt
    assert (layer.dequantize() - meant).norm() <= bound * meant.norm()
    assert (mode in report[path].reason and f"packed anew as {fmt}" in report[path].reason) == (mode != "mxfp4")


def test_nvfp4_with_a_scale_of_the_whole_tensor(tmp_path: Path) -> None:
    source, path = llama(), "model.layers.0.mlp.up_proj"
    tensors, _ = converted(source, lambda each: None if each == path else FOUR)
    parts, meant = mantissa_and_exponent("nvfp4", 512, 256)
    tensors |= {f"{path}.{leaf}": part for leaf, part in parts.items()} | {f"{path}.global_scale": torch.tensor(1344.0)}
    own = {path: {"group_size": 16, "bits": 4, "mode": "nvfp4"}}
    model, _ = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=FOUR | own))
    layer, _ = owner_of(model, path)
    assert (layer.dequantize() - meant / 2).norm() <= 0.03 * meant.norm() / 2


# ---- names and experts ----------------------------------------------------------------------------------------------


def switched(path: str = "experts", stacks: str = "switch_mlp", interleaved: bool = False) -> Any:
    """Names of fused experts in MLX: the gate and up projections apart, in stacks."""

    def names(name: str, tensor: Tensor) -> dict[str, Tensor]:
        start, _, leaf = name.rpartition(f".{path}.")
        if not start:
            return {name: tensor}
        whole, is_bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
        end = "bias" if is_bias else "weight"
        if interleaved and not is_bias:
            tensor = tensor.transpose(1, 2)  # the model stores [E, K, N]
        if whole == "down_proj":
            return {f"{start}.{stacks}.down_proj.{end}": tensor}
        assert whole == "gate_up_proj"
        gate, up = (tensor[:, 0::2], tensor[:, 1::2]) if interleaved else tensor.chunk(2, dim=1)
        return {f"{start}.{stacks}.gate_proj.{end}": gate, f"{start}.{stacks}.up_proj.{end}": up}

    return names


FAMILIES = {
    "Qwen3Moe": switched(),
    "Mixtral": lambda name, tensor: switched()(name.replace(".mlp.", ".block_sparse_moe."), tensor),
    "GptOss": switched(stacks="experts", interleaved=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_experts(family: str, tmp_path: Path) -> None:
    source, entry = tiny_moe(family), {"bits": 4, "group_size": 32}
    tensors, _ = converted(
        source, lambda path: entry if "router" not in path and "gate" != path[-4:] else None, names=FAMILIES[family]
    )
    assert any("up_proj.scales" in name for name in tensors)
    model, report = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=entry))
    assert not report.notes
    experts = next(module for module in model.modules() if isinstance(module, isqtorch.QuantExperts))
    assert experts.formats == {"gate_up_proj": "afq4g32", "down_proj": "afq4g32"}
    # the same experts, put together from what the folder means, row by row
    parts = {name: t for name, t in tensors.items() if "_proj.weight" in name and t.dim() == 3}
    meant = {}
    for name in parts:
        path = name.removesuffix(".weight")
        original = FAMILIES[family]
        for own, value in source.state_dict().items():
            found = original(own, value)
            if name in found:
                meant[path.rpartition(".")[2]] = affine(found[name], 4, 32, BF16)[1]
    gate, up = meant["gate_proj"], meant["up_proj"]
    rows = torch.stack([gate, up], 2).flatten(1, 2) if family == "GptOss" else torch.cat([gate, up], 1)
    assert torch.equal(experts.dequantize("gate_up_proj").float(), rows)
    assert torch.equal(experts.dequantize("down_proj").float(), meant["down_proj"])
    if family == "GptOss":
        assert torch.equal(
            experts.gate_up_proj_bias, owner_of(source, "model.layers.0.mlp.experts")[0].gate_up_proj_bias
        )


@pytest.mark.parametrize(
    "other", [{"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 6}, {"group_size": 64, "bits": 3}], ids=str
)
def test_parts_with_different_settings_keep_their_values(other: dict[str, int], tmp_path: Path) -> None:
    source, four = tiny_moe(), {"bits": 4, "group_size": 64}
    own = {
        "model.layers.0.mlp.switch_mlp.up_proj": other,
        "model.layers.0.mlp.switch_mlp.down_proj": {"group_size": 32, "bits": 4},
    }
    tensors, meant = converted(source, lambda path: own.get(path, four), names=switched())
    model, report = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=four | own))
    experts = next(module for module in model.modules() if isinstance(module, isqtorch.QuantExperts))
    common = get_format(f"afq{max(4, other['bits'])}g{other['group_size']}").name
    assert experts.formats == {"gate_up_proj": common, "down_proj": "afq4g32"}
    rows = [meant[f"model.layers.0.mlp.switch_mlp.{part}.weight"] for part in ("gate_proj", "up_proj")]
    assert torch.equal(experts.dequantize("gate_up_proj"), torch.cat(rows, 1))
    reason = report["model.layers.0.mlp.experts.gate_up_proj"].reason
    if other != four:
        assert (
            f"switch_mlp.up_proj is affine with {other['bits']} bits" in reason and f"both kept as {common}" in reason
        )


def test_parts_of_which_one_is_float_become_float(tmp_path: Path) -> None:
    source, four = tiny_moe(), {"bits": 4, "group_size": 32}
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors, meant = converted(source, lambda each: None if each == path else four, names=switched())
    model, report = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=four))
    experts = model.model.layers[0].mlp.experts
    assert not isinstance(experts, isqtorch.QuantExperts)
    assert f"{path} is float" in report["model.layers.0.mlp.experts.gate_up_proj"].reason
    assert "gate_up_proj of the same experts is float" in report["model.layers.0.mlp.experts.down_proj"].reason
    rows = [meant[f"model.layers.0.mlp.switch_mlp.{part}.weight"] for part in ("gate_proj", "up_proj")]
    assert torch.equal(experts.gate_up_proj, torch.cat(rows, 1))
    assert logits(model).isfinite().all()


def test_experts_that_are_kept_apart(tmp_path: Path) -> None:
    source, entry = tiny_moe(), {"bits": 4, "group_size": 32}

    def names(name: str, tensor: Tensor) -> dict[str, Tensor]:
        stacks = switched()(name, tensor)
        if name in stacks:
            return stacks
        return {
            stack.replace(".switch_mlp.", f".experts.{number}."): matrix
            for stack, matrices in stacks.items()
            for number, matrix in enumerate(matrices)
        }

    apart, _ = converted(source, lambda path: entry, names=names)
    stacked, _ = converted(source, lambda path: entry, names=switched())
    one, _ = opened(write(tmp_path / "apart", apart, source.config.to_dict(), quantization=entry))
    two, _ = opened(write(tmp_path / "stacked", stacked, source.config.to_dict(), quantization=entry))
    assert "model.layers.0.mlp.experts.5.up_proj.scales" in apart
    for mine, other in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_layers_that_the_model_stores_transposed(tmp_path: Path) -> None:
    source = tiny_gpt2()

    def names(name: str, tensor: Tensor) -> dict[str, Tensor]:
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        return {name.replace("transformer.", "model."): tensor.t() if turned else tensor}

    tensors, _ = converted(source, lambda path: None if "c_fc" in path or "wpe" in path else FOUR, names=names)
    model, report = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=FOUR))
    assert not report.notes
    block, original = model.transformer.h[0], source.transformer.h[0]
    assert torch.equal(block.mlp.c_fc.weight, original.mlp.c_fc.weight)  # float in the folder
    meant = affine(original.attn.c_attn.weight.t(), 4, 64, BF16)[1]
    assert torch.equal(block.attn.c_attn.dequantize(), meant)


def test_the_text_model_of_a_model_of_images(tmp_path: Path) -> None:
    """mlx-lm drops the tower and leaves the configuration as it was."""
    source = tiny("gemma3_text")
    tensors, meant = converted(source, lambda path: {"bits": 4, "group_size": 32})
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    config = {"model_type": "gemma3", "text_config": source.config.to_dict(), "vision_config": {"hidden_size": 64}}
    quantization = {"bits": 4, "group_size": 32, "language_model.lm_head": False}
    folder = write(tmp_path, tensors, config, quantization=quantization)
    model, report = opened(folder)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert not report.notes
    assert torch.equal(model.model.layers[0].mlp.up_proj.dequantize(), meant["model.layers.0.mlp.up_proj.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- requests -------------------------------------------------------------------------------------------------------


def test_another_format_is_made_of_the_values_in_the_folder(tmp_path: Path) -> None:
    source, entry = llama(), {"bits": 8, "group_size": 32}
    tensors, meant = converted(source, lambda path: entry)
    folder = write(tmp_path, tensors, source.config.to_dict(), quantization=entry)
    model, _ = opened(folder, Request("q4k", Options(exclude="down_proj"), "load"))
    layer = model.model.layers[0].mlp.up_proj
    packed = isqtorch.quantize(meant["model.layers.0.mlp.up_proj.weight"], "q4k")
    assert layer.format == "q4k"
    assert torch.equal(layer.dequantize(), packed.dequantize(torch.float32))
    assert model.model.layers[0].mlp.down_proj.format == "afq8g32"


def test_the_folder_is_the_source_of_requantize(tmp_path: Path) -> None:
    source, entry = llama(tied=True), {"bits": 8, "group_size": 32}
    tensors, meant = converted(source, lambda path: entry)
    model, _ = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=entry))
    for fmt in ("q2k", "q5k"):  # the second one does not see the errors of the first
        isqtorch.requantize_(model, fmt, progress=False)
    layer = model.model.layers[1].mlp.down_proj
    wanted = isqtorch.quantize(meant["model.layers.1.mlp.down_proj.weight"], "q5k").dequantize()
    assert layer.format == "q5k"
    assert torch.equal(layer.dequantize(), wanted)


def test_experts_in_the_folder_are_the_source_of_requantize(tmp_path: Path) -> None:
    source, entry = tiny_moe(), {"bits": 6, "group_size": 32}
    tensors, meant = converted(source, lambda path: entry, names=switched())
    model, _ = opened(write(tmp_path, tensors, source.config.to_dict(), quantization=entry))
    isqtorch.requantize_(model, "q8_0", progress=False)
    rows = torch.cat([meant[f"model.layers.0.mlp.switch_mlp.{part}.weight"] for part in ("gate_proj", "up_proj")], 1)
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.dequantize("gate_up_proj"), isqtorch.quantize(rows, "q8_0").dequantize())
