"""transformers models that another quantizer holds, or that one only read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hf import load, logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isqtorch
from isqtorch import QuantLinear, plan, quantize_, requantize_

transformers = pytest.importorskip("transformers")
from transformers.quantizers.auto import register_quantization_config, register_quantizer  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

METHOD = "isqtorch_test_method"


class Coded(nn.Module):
    """Codes kept in floats: nothing but the class and the record of transformers shows what they are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.step = float(linear.weight.detach().abs().max() / 127)
        self.codes = nn.Parameter((linear.weight.detach() / self.step).round(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes * self.step)


class Int8(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


@register_quantization_config(METHOD)
class TestConfig(QuantizationConfigMixin):  # type: ignore[misc]
    __test__ = False

    def __init__(self, **_: Any) -> None:
        self.quant_method = METHOD


@register_quantizer(METHOD)
class TestQuantizer(HfQuantizer):  # type: ignore[misc]
    __test__ = False

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def recorded(model: Any) -> Any:
    """As `from_pretrained` leaves a model of that method."""
    model.hf_quantizer = TestQuantizer(TestConfig())
    model.config.quantization_config = TestConfig()
    model.is_quantized, model.quantization_method = True, METHOD
    return model


def llama() -> Any:
    return models.tiny_llama(layers=1, dtype=torch.float32)


def held(layer: type[nn.Module]) -> Any:
    model = llama()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            model.set_submodule(path, layer(module))
    return recorded(model)


@pytest.mark.parametrize("layer", [Coded, Int8])
@pytest.mark.parametrize("options", [{}, {"exclude": r"layers\."}], ids=["all", "excluded"])
def test_refused_with_the_name_of_the_method(layer: type[nn.Module], options: dict[str, Any]) -> None:
    model = held(layer)
    before = [type(module) for module in model.modules()]
    for function in (quantize_, requantize_, plan):
        with pytest.raises(ValueError, match=rf"{function.__name__}: {METHOD} holds 7 layers .*IsqConfig"):
            function(model, "q4k", **options)
        with pytest.raises(ValueError, match=f"{METHOD} holds 7 layers"):
            function(model.model, "q4k", **options)
        with pytest.raises(ValueError, match=f"{METHOD} holds 7 layers"):
            function(nn.Sequential(model), "q4k", **options)
    assert [type(module) for module in model.modules()] == before
    assert METHOD in isqtorch.explain(model).notes[0]


def test_without_a_record_the_layers_alone_are_enough() -> None:
    model = held(Int8)
    model.hf_quantizer.remove_quantization_config(model)
    with pytest.raises(ValueError, match="another quantizer holds 7 layers .*save_pretrained"):
        quantize_(model, "q4k", exclude=r"layers\.")


@pytest.mark.parametrize("path", ["finegrained_fp8.FP8Linear", "bitnet.BitLinear"])
def test_layers_of_transformers_itself(path: str) -> None:
    module, _, name = path.partition(".")
    cls = getattr(__import__(f"transformers.integrations.{module}", fromlist=[name]), name)
    layer = cls(256, 256) if name == "FP8Linear" else cls(256, 256, bias=False)
    with pytest.raises(ValueError, match=rf"{module} holds 1 layer \({name}: 1\)"):
        quantize_(nn.Sequential(nn.Linear(256, 256), layer), "q4k")


def check_saved(model: Any, folder: Path, *, known: bool = False) -> None:
    """The model is packed in full, and its folder says so and loads with the same outputs.

    `known` says whether the weights can be read from the checkpoint again.
    """
    quantize_(model, "q4k", progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear) and model.quantization_method == "isq"
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "isq"
    assert torch.equal(logits(load(folder)), logits(model))
    if known:
        requantize_(model, "q5k", progress=False)
    else:
        with pytest.raises(ValueError, match="source="):
            requantize_(model, "q8_0")
    requantize_(model, "q8_0", source="stored", progress=False)


def test_plain_floats_under_a_quantizer_that_only_read_them(tmp_path: Path) -> None:
    model = recorded(llama())
    model.config.name_or_path = str(tmp_path / "gone")
    check_saved(model, tmp_path)


def test_fp8_that_was_decoded_on_loading(tmp_path: Path) -> None:
    models.tiny_llama(layers=1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "proj" in name:
            tiles = weight.float().view(weight.shape[0] // 128, 128, weight.shape[1] // 128, 128)
            scale = tiles.abs().amax((1, 3)) / 448
            tensors[name] = (tiles / scale[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {layer.stored for layer in plan(tmp_path, "q4k").layers if "proj" in layer.name} == {"q4k"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    check_saved(model.float(), tmp_path / "packed", known=True)


def test_a_gguf_file_that_transformers_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = llama()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(source.config.rms_norm_eps)
    writer.add_vocab_size(512)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(512)])
    writer.add_token_scores([0.0] * 512)
    writer.add_token_types([1] * 512)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in source.state_dict().items():
        values, target = tensor.numpy(), names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert model.quantization_method == "gguf"
    check_saved(model, tmp_path / "packed")


def test_bitsandbytes_after_dequantize(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path)
    options = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    with pytest.raises(ValueError, match=r"bitsandbytes holds 7 layers \(Linear8bitLt: "):
        quantize_(model, "q4k")
    model = model.dequantize()
    quantize_(model, "q4k", progress=False)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))
