"""The vLLM plug-in against a model of vLLM's interface for quantization methods (fake_vllm.py); vLLM itself is not installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import fake_vllm
import pytest
import torch
from fake_vllm import LinearBase, ParallelLMHead, VocabParallelEmbedding
from torch import Tensor

import isqtorch
from isqtorch import ops

QKV = ["q_proj", "k_proj", "v_proj"]
SIZES = [256, 64, 64]
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    from isqtorch.integrations.vllm import register

    register()
    register()  # once in every process at least


def config_of(content: dict[str, Any] | None) -> Any:
    cls = fake_vllm.CONFIGS["isq"]
    config = cls() if content is None else cls.from_config(content)
    config.packed_modules_mapping = {"qkv_proj": QKV, "gate_up_proj": ["gate_proj", "up_proj"]}
    return config


def weights(columns: int = 256) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, columns, generator=generator) for size in SIZES]


def x_of(columns: int = 256) -> Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(1))


def test_vllm_finds_the_plug_in() -> None:
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "isqtorch"]
    assert [point.value for point in found] == ["isqtorch.integrations.vllm:register"]


def test_what_vllm_asks() -> None:
    config = config_of(None)
    assert config.get_name() == "isq"
    assert config.get_min_capability() == -1
    assert config.get_config_filenames() == []
    assert set(config.get_supported_act_dtypes()) == {torch.float32, torch.float16, torch.bfloat16}


def test_activations_are_not_rounded_and_it_says_so() -> None:
    with pytest.warns(UserWarning, match="activations are not rounded to FP8 in vLLM"):
        config_of({"isq": "fp8", "layers": {f"{ATTENTION}.q_proj": "fp8"}, "activations": "fp8"})
    with pytest.raises(ValueError, match="unknown option 'activations'"):
        config_of({"isq": "fp8", "activations": "fp8"})


@pytest.mark.parametrize("ranks", [1, 2])
def test_merged_packed_layers(ranks: int) -> None:
    packed = [ops.quantize(w, "q4k") for w in weights()]
    config = config_of({"quant_method": "isq", "layers": {f"{ATTENTION}.{part}": "q4k" for part in QKV}})
    for rank in range(ranks):
        layer = LinearBase(256, SIZES, config, f"{ATTENTION}.qkv_proj", rank=rank, ranks=ranks)
        for part, tensor in enumerate(packed):
            layer.weight.weight_loader(layer.weight, tensor, part)
        layer.quant_method.process_weights_after_loading(layer)
        share = torch.cat([tensor.chunk(ranks)[rank] for tensor in packed])
        assert torch.equal(layer.weight, share)
        assert torch.equal(layer(x_of()), ops.linear(x_of(), share, "q4k"))


def test_inputs_are_cut_between_blocks() -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    packed, config = ops.quantize(w, "q4k"), config_of({"layers": {"down_proj": "q4k"}})
    x, total = x_of(512), torch.zeros(5, 64)
    for rank in range(2):
        layer = LinearBase(512, [64], config, "down_proj", by_input=True, rank=rank, ranks=2)
        layer.weight.weight_loader(layer.weight, packed)
        total += layer(x.chunk(2, dim=1)[rank])
    torch.testing.assert_close(total, ops.linear(x, packed, "q4k"), rtol=1e-4, atol=1e-4)


def test_a_cut_inside_a_block_is_refused() -> None:
    config = config_of({"layers": {"down_proj": "q4k"}})
    with pytest.raises(ValueError) as error:
        LinearBase(768, [64], config, "down_proj", by_input=True, ranks=2)
    assert str(error.value) == (
        "isq in vLLM: down_proj is q4k with 768 columns, of which this process gets 384, not a multiple of its block of 256. Use "
        "another tensor-parallel size, or pack this layer in a format with smaller blocks."
    )


def test_merged_layers_need_one_format() -> None:
    formats = dict(zip(QKV, ["q4k", "q4k", "q6k"], strict=True))
    layers = {f"{ATTENTION}.{part}": fmt for part, fmt in formats.items()}
    with pytest.raises(
        ValueError, match=r"merges these layers into .*qkv_proj, so they need one format: .*v_proj: q6k"
    ):
        LinearBase(256, SIZES, config_of({"layers": layers}), f"{ATTENTION}.qkv_proj")
    with pytest.raises(ValueError, match="k_proj: float"):
        LinearBase(256, SIZES, config_of({"layers": {f"{ATTENTION}.q_proj": "q4k"}}), f"{ATTENTION}.qkv_proj")
    online = {"isq": 4, "topology": {"/v_proj/": "q6k"}}
    with pytest.raises(ValueError, match="Give them the same in the topology"):
        LinearBase(256, SIZES, config_of(online), f"{ATTENTION}.qkv_proj")


def test_float_layers_stay_float() -> None:
    layer = LinearBase(256, SIZES, config_of({"layers": {}}), f"{ATTENTION}.qkv_proj")
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("content", [None, {"isq": "q6k"}, {"quant_method": "isq", "isq": 8}])
def test_packing_while_vllm_loads(content: dict[str, Any] | None) -> None:
    expected = isqtorch.resolve_format((content or {"isq": 4})["isq"]).name
    layer = LinearBase(256, SIZES, config_of(content), f"{ATTENTION}.qkv_proj")
    for part, w in enumerate(weights()):
        layer.weight.weight_loader(layer.weight, w, part)
    for _ in range(2):
        layer.quant_method.process_weights_after_loading(layer)
    packed = ops.quantize(torch.cat(weights()), expected)
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer(x_of()), ops.linear(x_of(), packed, expected))


def test_packing_falls_back_by_the_share_of_the_process() -> None:
    layer = LinearBase(768, [64], config_of({"isq": "q4k"}), "down_proj", by_input=True, ranks=2)
    assert layer.quant_method.format.name == "q5_0"  # 384 columns


def test_excluded_layers_and_routers_stay_float() -> None:
    config = config_of({"isq": 4, "exclude": "o_proj"})
    for prefix, outputs in ((f"{ATTENTION}.o_proj", 256), ("model.layers.0.mlp.gate", 8)):
        layer = LinearBase(256, [outputs], config, prefix)
        w = torch.randn(outputs, 256)
        layer.weight.weight_loader(layer.weight, w)
        layer.quant_method.process_weights_after_loading(layer)
        assert torch.equal(layer(x_of()), torch.nn.functional.linear(x_of(), w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_tables_and_heads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    table = torch.randn(100, 256, generator=torch.Generator().manual_seed(0))
    packed = ops.quantize(table, "q6k")
    config = config_of({"layers": {"model.embed_tokens": "q6k", "lm_head": "q6k"}})
    embedding = VocabParallelEmbedding(100, 256, config, "model.embed_tokens", dtype)
    embedding.weight.weight_loader(embedding.weight, packed)
    ids = torch.tensor([[0, 99], [7, 101]])  # 101: padding, of zeros
    rows = embedding(ids)
    assert rows.dtype == dtype and not rows[1, 1].any()
    assert torch.equal(rows[0], ops.embedding(ids[0], packed, "q6k", dtype))
    head = ParallelLMHead(100, 256, config, "lm_head", dtype)
    head.weight.weight_loader(head.weight, packed)
    logits = head.quant_method.apply(head, x_of().to(dtype))
    assert torch.equal(logits[:, :100], ops.linear(x_of().to(dtype), packed, "q6k"))


def test_packed_experts_are_refused() -> None:
    config = config_of({"layers": {"model.layers.0.mlp.experts.gate_up_proj": "q4k"}})
    with pytest.raises(NotImplementedError, match="holds packed experts, which are not supported in vLLM yet"):
        config.get_quant_method(fake_vllm.FusedMoE(), "model.layers.0.mlp.experts")


def test_experts_that_stay_float_are_named() -> None:
    with pytest.warns(UserWarning, match=r"the experts of model\.layers\.0\.mlp\.experts stay float"):
        assert config_of({"isq": 4}).get_quant_method(fake_vllm.FusedMoE(), "model.layers.0.mlp.experts") is None


@pytest.mark.filterwarnings("error")
def test_other_layers_are_none_of_its_business() -> None:
    assert config_of({"isq": 4}).get_quant_method(torch.nn.Identity(), "model.layers.0.self_attn.attn") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"isq": "q9"}, "q9"),
        ({"isq": "q4k_m"}, "gives layers different formats, and vLLM asks layer by layer"),
        ({"isq": 4, "tolopogy": {}}, "unknown option 'tolopogy'"),
        ({"format_version": 99, "layers": {}}, "newer than 1, the newest known here"),
        ({"layers": ["q_proj"]}, "'layers' must map paths of layers to formats, got list"),
        ({"layers": {"q_proj": "q9"}}, "layer 'q_proj'"),
    ],
)
def test_bad_configurations(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(content)


def test_layers_of_small_weights_are_said() -> None:
    layer = LinearBase(256, SIZES, config_of({"isq": "q6k"}), f"{ATTENTION}.qkv_proj", rank=0, ranks=1)
    for part, tensor in enumerate(weights()):
        layer.weight.weight_loader(layer.weight, tensor * 1e-6, part)
    with pytest.warns(UserWarning, match=r"isq in vLLM: 1 layer lost much more than usual: .*qkv_proj \(q6k\)"):
        layer.quant_method.process_weights_after_loading(layer)


def test_weights_that_cannot_be_packed_are_named_once() -> None:
    layer = LinearBase(256, SIZES, config_of({"isq": "q6k"}), f"{ATTENTION}.qkv_proj", rank=0, ranks=1)
    for part, tensor in enumerate(weights()):
        layer.weight.weight_loader(layer.weight, tensor, part)
    layer.weight.data[0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"^isq in vLLM: .*qkv_proj: weight\[0, 3\] is nan"):
        layer.quant_method.process_weights_after_loading(layer)
