"""The vLLM plug-in and whole models: formats for all layers at once, and weights that vLLM asks no plug-in about."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import pytest
import torch
from fake_vllm import LinearBase, VocabParallelEmbedding, config_of
from helpers import relative_error
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from isqtorch import ops

DEMO = Path(__file__).resolve().parent.parent.parent / "examples/demo_model/model"
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


def demo_config() -> Any:
    return AutoConfig.from_pretrained(DEMO)


def test_a_mix_is_decided_on_the_whole_model() -> None:
    """As `from_pretrained` would, under the names of transformers, which are then those of vLLM."""
    config = config_of({"isq": "q4k_m", "exclude": "layers.1.self_attn.o_proj"})
    config.maybe_update_config("demo", hf_config=demo_config())
    config.apply_vllm_mapper(fake_vllm.WeightsMapper({"model.": "language_model.model."}))
    layers = "language_model.model.layers"
    down = [
        LinearBase(768, [256], config, f"{layers}.{i}.mlp.down_proj").quant_method.parts[0].format for i in range(8)
    ]
    assert [fmt.name for fmt in down] == ["q6k", "q4k", "q4k", "q6k", "q4k", "q4k", "q6k", "q6k"]
    qkv = LinearBase(256, [256, 128, 128], config, f"{layers}.0.self_attn.qkv_proj").quant_method.parts
    assert [part.format.name for part in qkv] == ["q4k", "q4k", "q6k"]
    assert isinstance(
        LinearBase(256, [256], config, f"{layers}.1.self_attn.o_proj").quant_method, fake_vllm.UnquantizedLinearMethod
    )
    table = VocabParallelEmbedding(4096, 256, config)
    assert table.quant_method.parts[0].format.name == "q6k"


def test_without_the_model_each_layer_is_decided_alone(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of({"isq": "q4k_m"})
    config.maybe_update_config("demo", hf_config=PreTrainedConfig(architectures=["OtherForCausalLM"]))
    assert "formats are chosen layer by layer, because transformers cannot make the model" in caplog.text
    layer = LinearBase(256, [64], config, "model.layers.0.self_attn.o_proj")
    assert layer.quant_method.parts[0].format.name == "q4k"
    assert "o_proj gets q4k, because transformers does not know it" in caplog.text


def test_requests_that_do_not_fit_the_model() -> None:
    for content, message in (
        ({"isq": "auto"}, "'auto' chooses formats by measuring weights, which isq in vLLM does not do"),
        ({"isq": 4, "organization": "moqe"}, "this model has no fused experts"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(content).maybe_update_config("demo", hf_config=demo_config())


def loaded(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the loader gives to a model."""
    fake_vllm.CURRENT[0] = SimpleNamespace(quant_config=config)
    loader = fake_vllm.LOADERS["auto"](tensors)
    return dict(loader.get_all_weights(SimpleNamespace(dtype=torch.bfloat16), torch.nn.Module()))


def test_weights_that_nobody_asks_about_are_decoded(caplog: pytest.LogCaptureFixture) -> None:
    packed = ops.quantize(torch.randn(100, 256), "q6k")
    expert = ops.quantize(torch.randn(32, 256), "q8_0")
    config = config_of(
        {"layers": {"model.embed_tokens": "q6k", "model.norm_proj": "q6k", f"{EXPERTS}.gate_up_proj": "q8_0"}}
    )
    config.apply_vllm_mapper(fake_vllm.WeightsMapper({"model.": "language_model.model."}))
    config.get_quant_method(LinearBase.__new__(LinearBase), "language_model.model.norm_proj")
    VocabParallelEmbedding(100, 256)  # like Gemma's: it has no configuration
    tensors = {
        "model.embed_tokens.weight": packed,
        "model.norm_proj.weight": packed,
        "model.norm.weight": torch.ones(256),
        f"{EXPERTS}.3.gate_proj.weight": expert,
    }
    found = loaded(config, tensors)
    assert torch.equal(found["model.embed_tokens.weight"], ops.dequantize(packed, "q6k", torch.bfloat16))
    assert torch.equal(found[f"{EXPERTS}.3.gate_proj.weight"], ops.dequantize(expert, "q8_0", torch.bfloat16))
    assert found["model.norm_proj.weight"] is packed and found["model.norm.weight"] is tensors["model.norm.weight"]
    assert (
        f"asks no plug-in about model.embed_tokens, {EXPERTS}.gate_up_proj, which the checkpoint has packed"
        in caplog.text
    )


def test_bytes_of_another_format_than_config_json_says() -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 211, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="config.json says that model.embed_tokens.weight is q6k, but .*damaged"):
        loaded(config_of({"layers": {"model.embed_tokens": "q6k"}}), tensors)


def test_stacks_of_experts_are_given_one_by_one() -> None:
    """Llama 4 and others keep them as stacks, for which vLLM's code swaps axes."""
    gate_up, down = (ops.quantize(torch.randn(2, *shape), "q8_0") for shape in ((64, 96), (96, 32)))
    layers = {f"{EXPERTS}.gate_up_proj": "q8_0", f"{EXPERTS}.down_proj": "q8_0"}
    config = config_of({"layers": layers})
    tensors = {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.down_proj": down}
    fake_vllm.RoutedExperts(2, 96, 32, config, EXPERTS)
    found = loaded(config, tensors)
    assert list(found) == [
        *(f"{EXPERTS}.{e}.{name}_proj.weight" for e in range(2) for name in ("gate", "up")),
        *(f"{EXPERTS}.{e}.down_proj.weight" for e in range(2)),
    ]
    assert torch.equal(found[f"{EXPERTS}.1.up_proj.weight"], gate_up[1, 32:])


class _OfGptOss:
    """Renames as vLLM's gpt-oss: stacks of experts get the names of its parameters."""

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        leaves = {".gate_up_proj": ".w13_weight", ".down_proj": ".w2_weight"}
        renamed = {}
        for name, value in values.items():
            end = next((end for end in leaves if name.endswith(end)), None)
            renamed[name if end is None else name.removesuffix(end) + leaves[end]] = value
        return renamed


@pytest.mark.parametrize("online", [False, True])
def test_experts_of_gpt_oss_are_given_whole(online: bool) -> None:
    """An expert's gate and up, which take turns, stay one matrix, and its biases come with it."""
    gate_up, down = torch.randn(2, 64, 96), torch.randn(2, 96, 32)
    tensors = {
        f"{EXPERTS}.gate_up_proj": gate_up.transpose(1, 2) if online else ops.quantize(gate_up, "mxfp4"),
        f"{EXPERTS}.gate_up_proj_bias": torch.randn(2, 64),
        f"{EXPERTS}.down_proj": down.transpose(1, 2) if online else ops.quantize(down, "mxfp4"),
        f"{EXPERTS}.down_proj_bias": torch.randn(2, 96),
    }
    layers = {f"{EXPERTS}.gate_up_proj": "mxfp4", f"{EXPERTS}.down_proj": "mxfp4"}
    config = config_of({"isq": "mxfp4"} if online else {"layers": layers})
    if online:
        config.formats._known = dict(layers)  # what `resolve` finds out
        config.formats._original = {path: path for path in layers}
    config.apply_vllm_mapper(_OfGptOss())
    layer = fake_vllm.GptOssRoutedExperts(2, 96, 32, config, EXPERTS, activation="swigluoai", biases=True)
    found = loaded(config, tensors)
    assert list(found) == [
        f"{EXPERTS}.{e}.{part}_{kind}" for part in ("w13", "w2") for kind in ("weight", "bias") for e in range(2)
    ]
    for name, value in found.items():
        number, leaf = name.removeprefix(f"{EXPERTS}.").split(".")
        weight = layer.get_parameter(leaf)
        weight.weight_loader(weight, value, f"gpt_oss_{leaf.partition('_')[0]}", int(number))
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.w13_weight, ops.quantize(gate_up, "mxfp4"))
    assert torch.equal(layer.w2_weight, ops.quantize(down, "mxfp4"))
    assert torch.equal(layer.w2_bias, tensors[f"{EXPERTS}.down_proj_bias"])
    x, ids, scores = torch.randn(3, 96), torch.tensor([[0, 1], [1, 0], [1, 1]]), torch.rand(3, 2)
    y = layer.quant_method.apply(layer, x, scores, ids, None, None)
    w13, w2 = (ops.dequantize(w, "mxfp4", torch.float32) for w in (layer.w13_weight, layer.w2_weight))
    for row in range(3):
        want = torch.zeros(96)
        for expert, score in zip(ids[row].tolist(), scores[row], strict=True):
            hidden = w13[expert] @ x[row] + tensors[f"{EXPERTS}.gate_up_proj_bias"][expert]
            gate, up = hidden[::2].clamp(max=7), hidden[1::2].clamp(-7, 7)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            want += score * (w2[expert] @ inner + tensors[f"{EXPERTS}.down_proj_bias"][expert])
        assert relative_error(y[row], want) < 0.02


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_a_checkpoint_of_another_program_is_refused(dtype: torch.dtype) -> None:
    tensors = {"model.layers.0.mlp.down_proj.weight": torch.zeros(4, 32).to(dtype)}
    with pytest.raises(ValueError, match="another program has quantized this checkpoint.*save_pretrained"):
        loaded(config_of({"isq": 4}), tensors)
    with pytest.raises(ValueError, match="MLX or another program has quantized.*save_pretrained"):
        config_of({"group_size": 64, "bits": 4})


def test_the_layers_of_other_stages_are_not_decoded() -> None:
    fake_vllm.MISSING.append("model.layers.1.")
    config = config_of({"layers": {"model.layers.1.mlp.down_proj": "q6k"}})
    assert loaded(config, {"model.layers.1.mlp.down_proj.weight": ops.quantize(torch.randn(4, 256), "q6k")}) == {}


def test_layers_that_stay_float_are_said_online(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of({"isq": 4})
    config.maybe_update_config("demo", hf_config=demo_config())
    for path in list(config.formats.unasked()):
        if path != "model.embed_tokens":
            config.formats.is_float([path])
    assert loaded(config, {"x": torch.ones(1)}) == {"x": torch.ones(1)}
    assert "asks no plug-in about model.embed_tokens: they stay float" in caplog.text


def test_other_methods_get_vllms_own_loader() -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 4, dtype=torch.uint8)}
    assert loaded(object(), tensors) == tensors
    assert fake_vllm.LOADERS["dummy"] is fake_vllm.DummyModelLoader


@pytest.mark.parametrize(
    "content", [{"layers": {"lm_head": "q6k"}}, {"isq": 4, "topology": {"/v_proj/": 8}, "exclude": "o_proj"}]
)
def test_the_configuration_goes_to_other_processes(content: dict[str, Any]) -> None:
    config = config_of(content)
    config.maybe_update_config("demo", hf_config=demo_config())
    other = pickle.loads(pickle.dumps(config))
    for path in ("lm_head", "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"):
        layers = [LinearBase(256, [256], each, path) for each in (config, other)]
        one, two = (getattr(layer.quant_method, "parts", None) for layer in layers)
        assert one == two
