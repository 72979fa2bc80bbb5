"""Models of diffusers: all linear layers are packed, also those of attention, and what diffusers does to layers works."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import isqtorch
from isqtorch import checkpoint

diffusers = pytest.importorskip("diffusers")

from diffusion import MODELS, made, output, pipeline, saved_pipeline  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet")
ROOT = Path(__file__).resolve().parent.parent.parent
CLOSE = 0.02  # relative error of the outputs with 8 bits
every_model = pytest.mark.parametrize("name", MODELS)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@every_model
def test_every_linear_layer_is_packed(name: str) -> None:
    model, inputs = made(name)
    linear = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    before = output(model, inputs)
    report = isqtorch.quantize_(model, "q8_0", progress=False)
    left = {layer.name: layer.reason for layer in report.left}
    assert {path: left[path] for path in linear & set(left)} == {
        path: "the model keeps it in float32 (_keep_in_fp32_modules)"
        for path in linear
        if "time_embedder" in path and name == "wan"
    }
    attention = {path.rpartition(".attn")[2] for path in linear - set(left) if ".attn" in path}
    assert any(path.endswith("to_q") for path in attention) and any(path.endswith("to_out.0") for path in attention)
    assert any(re.search(r"ffn?\.net\.2$", path) for path in linear - set(left))
    for path in set(left) - linear:
        assert "convolutions are never quantized" in left[path] or "a parameter of Wan" in left[path]
    assert 0 < error(output(model, inputs), before) < CLOSE


@pytest.mark.parametrize("name", [name for name in MODELS if name != "sd3 dual"])
def test_fused_projections(name: str) -> None:
    model, inputs = made(name)
    before = output(model, inputs)

    fused = copy.deepcopy(model)
    fused.fuse_qkv_projections()
    report = isqtorch.quantize_(fused, "q8_0", progress=False)
    assert {layer.stored for layer in report.layers if re.search(r"to_(added_)?(qkv|kv)$", layer.name)} == {"q8_0"}
    assert error(output(fused, inputs), before) < CLOSE
    fused.unfuse_qkv_projections()
    assert error(output(fused, inputs), before) < CLOSE

    isqtorch.quantize_(model, "q8_0", progress=False)
    packed = output(model, inputs)
    model.fuse_qkv_projections()  # joins the decoded weights, in float
    assert error(output(model, inputs), before) < CLOSE
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, inputs), packed)


@every_model
def test_a_file_of_ours_there_and_back(name: str, tmp_path: Path) -> None:
    from accelerate import init_empty_weights

    model, inputs = made(name)
    isqtorch.quantize_(model, 4, progress=False)
    checkpoint.save(model, tmp_path / "packed.safetensors")
    with init_empty_weights():
        again = type(model).from_config(model.config)
    checkpoint.load_(again, tmp_path / "packed.safetensors")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    torch.testing.assert_close(output(again.eval(), inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


@every_model
def test_save_pretrained_refuses_and_names_the_way_out(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    isqtorch.quantize_(model, "q8_0", progress=False)
    packed = output(model, inputs)
    with pytest.raises(
        ValueError, match=rf"save_pretrained of {type(model).__name__}: .*checkpoint\.save.*dequantize_"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    isqtorch.dequantize_(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert error(output(again, inputs), packed) < CLOSE


# ---- requantize_ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "100kB"}], ids=str)
def test_requantize_reads_the_folder_that_diffusers_read(options: dict[str, str], tmp_path: Path) -> None:
    model, inputs = made("flux")
    model.save_pretrained(tmp_path, **options)
    wanted = copy.deepcopy(model)
    isqtorch.quantize_(wanted, "q8_0", progress=False)
    loaded = type(model).from_pretrained(tmp_path, variant=options.get("variant")).eval()
    isqtorch.quantize_(loaded, "q4_0", progress=False)
    isqtorch.requantize_(loaded, "q8_0", progress=False)
    assert error(output(loaded, inputs), output(wanted, inputs)) < 1e-6


def test_of_an_index_and_a_single_file_the_index_counts_as_in_diffusers(tmp_path: Path) -> None:
    model, _ = made("flux")
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    other = copy.deepcopy(model)
    nn.init.ones_(other.proj_out.weight)
    other.save_pretrained(tmp_path / "other")
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / "other" / name).rename(tmp_path / name)
    loaded = type(model).from_pretrained(tmp_path)
    isqtorch.quantize_(loaded, "q4_0", progress=False)
    isqtorch.requantize_(loaded, "q8_0", progress=False)
    torch.testing.assert_close(loaded.proj_out.dequantize(), model.proj_out.weight, rtol=0, atol=0.01)


def test_requantize_finds_the_subfolder_of_a_pipeline(tmp_path: Path) -> None:
    saved_pipeline(tmp_path)
    of_pipeline = diffusers.FluxPipeline.from_pretrained(tmp_path).transformer
    alone = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    for model in (of_pipeline, alone):
        isqtorch.quantize_(model, "q4_0", progress=False)
        assert isqtorch.requantize_(model, "q8_0", progress=False)["proj_out"].stored == "q8_0"


def test_a_model_that_changed_since_is_refused(tmp_path: Path) -> None:
    model, _ = made("unet")
    model.save_pretrained(tmp_path)
    changed = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        changed.conv_in.weight.add_(1)
    isqtorch.quantize_(changed, "q4_0", progress=False)
    with pytest.raises(ValueError, match=r"conv_in\.weight \(by up to 1\) was not what the checkpoint has"):
        isqtorch.requantize_(changed, "q8_0", progress=False)


def test_two_subfolders_of_one_class_are_not_guessed(tmp_path: Path) -> None:
    model, _ = made("wan")  # Wan 2.2 has two transformers
    model.save_pretrained(tmp_path / "transformer")
    model.save_pretrained(tmp_path / "transformer_2")
    loaded = type(model).from_pretrained(tmp_path, subfolder="transformer_2")
    isqtorch.quantize_(loaded, "q4_0", progress=False)
    with pytest.raises(ValueError, match="it is not known where"):
        isqtorch.requantize_(loaded, "q8_0", progress=False)
    isqtorch.requantize_(loaded, "q8_0", source=tmp_path / "transformer_2", progress=False)


# ---- what diffusers does to layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_offloading_by_groups(kind: str, on_disk: bool, tmp_path: Path) -> None:
    model, inputs = made("flux")
    isqtorch.quantize_(model, "q8_0", progress=False)
    packed = output(model, inputs)
    options: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    if on_disk:
        options["offload_to_disk_path"] = str(tmp_path)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, **options)
    assert torch.equal(output(model, inputs), packed)


def test_layerwise_casting_leaves_packed_weights() -> None:
    model, inputs = made("flux")
    isqtorch.quantize_(model, "q8_0", progress=False)
    packed = output(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert error(output(model, inputs), packed) < CLOSE  # biases and norms are cast


def test_counts_are_those_of_weights() -> None:
    model, _ = made("flux")
    count = model.num_parameters()
    isqtorch.quantize_(model, "q8_0", progress=False)
    assert model.num_parameters() == count
    assert model.dtype == torch.float32


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = made("flux")
    isqtorch.quantize_(model, "q8_0", progress=False)
    packed, bare = output(model, inputs), copy.deepcopy(model)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapted = output(model, inputs)
    assert error(adapted, packed) > 0.001
    model.save_lora_adapter(tmp_path)
    bare.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(output(bare, inputs), adapted)
    model.delete_adapters("default")
    assert torch.equal(output(model, inputs), packed)


# ---- pipelines -------------------------------------------------------------------------------------------------------


def image(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 16}
    images: torch.Tensor = pipe("hello world", output_type="pt", generator=torch.manual_seed(0), **size).images
    return images


def test_a_whole_pipeline() -> None:
    pipe = pipeline()
    before = image(pipe)
    isqtorch.quantize_(pipe.transformer, "q8_0", progress=False)
    isqtorch.quantize_(pipe.text_encoder_2, "q8_0", progress=False)
    after = image(pipe)
    assert 0 < (after - before).abs().max() < 0.02


def test_a_pipeline_is_no_model_and_its_parts_are_named() -> None:
    pipe = pipeline()
    named = r"a FluxPipeline only holds some: transformer \(FluxTransformer2DModel, 1\.\d+ MB\), vae \(AutoencoderKL,.*text_encoder_2"
    with pytest.raises(TypeError, match=rf"quantize_: .*{named}.*: quantize_\(pipe\.transformer, 4\)"):
        isqtorch.quantize_(pipe, 4)
    with pytest.raises(TypeError, match=r"dequantize_: .*dequantize_\(pipe\.transformer, \.\.\.\)"):
        isqtorch.dequantize_(pipe)


def test_folders_of_diffusers_are_recognized(tmp_path: Path) -> None:
    saved_pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"is a pipeline of diffusers.*quantize_\(pipe\.transformer, 4\)"):
        isqtorch.load(tmp_path, 4)
    with pytest.raises(ValueError, match=r"is a FluxTransformer2DModel of diffusers.*quantize_\(model, 4\)"):
        isqtorch.load(tmp_path / "transformer", 4)


def test_the_code_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    section = guide.partition("\n## Images and video\n")[2].partition("\n## ")[0]
    program = "\n".join(re.findall(r"^```py\n(.*?)^```", section, re.M | re.S))
    assert "quantize_(pipe.transformer" in program
    saved_pipeline(tmp_path / "pipeline")
    program = program.replace("black-forest-labs/FLUX.1-schnell", str(tmp_path / "pipeline")).replace(
        "bfloat16", "float32"
    )
    assert "num_inference_steps=4" in program
    program = program.replace("steps=4", "steps=1, max_sequence_length=16, height=16, width=16")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["image"].size == (16, 16)
    assert any(isinstance(module, isqtorch.QuantLinear) for module in names["pipe"].transformer.modules())
