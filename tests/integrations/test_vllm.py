"""The vLLM plug-in against a model of what plug-ins see of vLLM (fake_vllm.py). tests/vllm has the same with vLLM itself."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import fake_vllm
import pytest
import torch
from fake_vllm import LinearBase, ParallelLMHead, VocabParallelEmbedding, config_of
from torch import Tensor

import isqtorch
from isqtorch import ops

QKV = ["q_proj", "k_proj", "v_proj"]
SIZES = [256, 64, 64]
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


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


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("formats", [["q4k"] * 3, ["q4k", "q4k", "q6k"], ["q8_0", None, "fp8"]], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_merged_packed_layers(ranks: int, formats: list[str | None], by_name: bool) -> None:
    """Each part has its format, or stays float; rows of several lengths are in one weight only while they are loaded."""
    stored = [w if fmt is None else ops.quantize(w, fmt) for w, fmt in zip(weights(), formats, strict=True)]
    config = config_of({"layers": {f"{ATTENTION}.{part}": fmt for part, fmt in zip(QKV, formats, strict=True) if fmt}})
    bias = torch.randn(sum(SIZES))
    for rank in range(ranks):
        layer = LinearBase(256, SIZES, config, f"{ATTENTION}.qkv_proj", rank=rank, ranks=ranks, by_name=by_name)
        for part, tensor in zip("qkv", stored, strict=True):
            layer.weight.weight_loader(layer.weight, tensor, part)
        for _ in range(2):
            layer.quant_method.process_weights_after_loading(layer)
        own = torch.cat([part.chunk(ranks)[rank] for part in bias.split(SIZES)])
        shares = [tensor.chunk(ranks)[rank] for tensor in stored]
        expected = torch.cat([product(x_of(), share, fmt) for share, fmt in zip(shares, formats, strict=True)], -1)
        assert torch.equal(layer(x_of()), expected)
        torch.testing.assert_close(layer.quant_method.apply(layer, x_of(), own), expected + own)
        decoded = [
            s if f is None else ops.dequantize(s, f, torch.float32) for s, f in zip(shares, formats, strict=True)
        ]
        assert torch.equal(layer.quant_method.dequantize_weight(layer), torch.cat(decoded))
        held = sum(each.nbytes for each in layer.parameters())
        assert held == sum(share.nbytes for share in shares)


def product(x: Tensor, weight: Tensor, fmt: str | None) -> Tensor:
    return torch.nn.functional.linear(x, weight) if fmt is None else ops.linear(x, weight, fmt)


def test_a_merged_matrix_of_the_checkpoint() -> None:
    """Phi-3 has q, k and v as one matrix: one part of one format, or an error that names them."""
    packed = ops.quantize(torch.cat(weights()), "q4k")
    config = config_of({"layers": {f"{ATTENTION}.qkv_proj": "q4k"}})
    config.packed_modules_mapping = {}
    layer = LinearBase(256, SIZES, config, f"{ATTENTION}.qkv_proj")
    layer.weight.weight_loader(layer.weight, packed)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer(x_of()), ops.linear(x_of(), packed, "q4k"))
    mixed = config_of(
        {"layers": {f"{ATTENTION}.{part}": fmt for part, fmt in zip(QKV, ["q4k", "q4k", "q6k"], strict=True)}}
    )
    layer = LinearBase(256, SIZES, mixed, f"{ATTENTION}.qkv_proj")
    with pytest.raises(ValueError, match="one matrix for .*qkv_proj, whose parts have several formats"):
        layer.weight.weight_loader(layer.weight, packed)
    with pytest.raises(ValueError, match=r"qkv_proj in 4 parts, so they need one format: .*v_proj: q6k"):
        LinearBase(256, [64] * 4, mixed, f"{ATTENTION}.qkv_proj")


def test_values_of_another_kind_than_config_json_says() -> None:
    formats = dict(zip(QKV, ["q4k", "q4k", "q6k"], strict=True))
    config = config_of({"layers": {f"{ATTENTION}.{part}": fmt for part, fmt in formats.items()}})
    layer = LinearBase(256, SIZES, config, f"{ATTENTION}.qkv_proj")
    with pytest.raises(
        ValueError, match=r"config.json says that .*q_proj is q4k, but the checkpoint has float32 values"
    ):
        layer.weight.weight_loader(layer.weight, weights()[0], "q")


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


def test_float_layers_stay_float() -> None:
    layer = LinearBase(256, SIZES, config_of({"layers": {}}), f"{ATTENTION}.qkv_proj")
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("content", [None, {"isq": "q6k"}, {"quant_method": "isq", "isq": 8}])
def test_packing_while_vllm_loads(content: dict[str, Any] | None) -> None:
    expected = isqtorch.resolve_format((content or {"isq": 4})["isq"]).name
    layer = LinearBase(256, SIZES, config_of(content), f"{ATTENTION}.qkv_proj")
    assert layer.weight.is_meta, "there is a float weight before anything is loaded"
    load(layer, weights())
    packed = ops.quantize(torch.cat(weights()), expected)
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer(x_of()), ops.linear(x_of(), packed, expected))


def test_parts_are_packed_each_in_its_format() -> None:
    config = config_of({"isq": 4, "topology": {"/v_proj/": "q6k", "/k_proj/": None}})
    layer = LinearBase(256, SIZES, config, f"{ATTENTION}.qkv_proj")
    load(layer, weights())
    q, k, v = weights()
    expected = [
        product(x_of(), ops.quantize(q, "q4k"), "q4k"),
        x_of() @ k.T,
        product(x_of(), ops.quantize(v, "q6k"), "q6k"),
    ]
    torch.testing.assert_close(layer(x_of()), torch.cat(expected, -1))


def load(layer: LinearBase, values: list[Tensor]) -> None:
    """As vLLM does: while a layer is on the meta device, its parameter is taken again for each tensor."""
    for part, w in zip("qkv", values, strict=False):
        weight = layer.weight
        weight.weight_loader(weight, w, *([part] if len(values) > 1 else []))
    for _ in range(2):
        layer.quant_method.process_weights_after_loading(layer)


def test_packing_falls_back_by_the_share_of_the_process() -> None:
    layer = LinearBase(768, [64], config_of({"isq": "q4k"}), "down_proj", by_input=True, ranks=2)
    assert [part.format.name for part in layer.quant_method.parts] == ["q5_0"]  # 384 columns


def test_excluded_layers_and_routers_stay_float() -> None:
    config = config_of({"isq": 4, "exclude": "o_proj"})
    for prefix, outputs in ((f"{ATTENTION}.o_proj", 256), ("model.layers.0.mlp.gate", 8)):
        layer = LinearBase(256, [outputs], config, prefix)
        w = torch.randn(outputs, 256)
        load(layer, [w])
        assert torch.equal(layer(x_of()), torch.nn.functional.linear(x_of(), w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", [True, False])
def test_packed_tables_and_heads(named: bool, dtype: torch.dtype) -> None:
    """Half of vLLM's models give their tables no prefix."""
    table = torch.randn(100, 256, generator=torch.Generator().manual_seed(0))
    packed = ops.quantize(table, "q6k")
    config = config_of({"layers": {"model.embed_tokens": "q6k", "lm_head": "q6k", f"{ATTENTION}.o_proj": "q4k"}})
    embedding = VocabParallelEmbedding(100, 256, config, "model.embed_tokens" if named else "", dtype)
    embedding.weight.weight_loader(embedding.weight, packed)
    embedding.quant_method.process_weights_after_loading(embedding)
    ids = torch.tensor([[0, 99], [7, 101]])  # 101: padding, of zeros
    rows = embedding(ids)
    assert rows.dtype == dtype and not rows[1, 1].any()
    assert torch.equal(rows[0], ops.embedding(ids[0], packed, "q6k", dtype))
    head = ParallelLMHead(100, 256, config, "lm_head" if named else "", dtype)
    head.weight.weight_loader(head.weight, packed)
    logits = head.quant_method.apply(head, x_of().to(dtype))
    assert torch.equal(logits[:, :100], ops.linear(x_of().to(dtype), packed, "q6k"))


def test_a_table_without_a_name_that_may_be_any_of_two() -> None:
    config = config_of({"layers": {"model.embed_tokens": "q6k", "model.embed_tokens_per_layer": "q4k"}})
    with pytest.raises(
        ValueError, match=r"a table without a name, .*exclude=\['embed_tokens', 'embed_tokens_per_layer'\]"
    ):
        VocabParallelEmbedding(100, 256, config)


@pytest.mark.parametrize("online", [False, True])
def test_a_tied_head_computes_with_the_table(online: bool) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed = ops.quantize(w, "q8_0")
    layers = {"model.embed_tokens": "q8_0", "lm_head": "q8_0"}
    config = config_of({"isq": 8} if online else {"layers": layers})
    table = VocabParallelEmbedding(64, 256, config)
    head = ParallelLMHead(64, 256, config, "lm_head").tie_weights(table)
    table.weight.weight_loader(table.weight, w if online else packed)
    for module in (table, head):
        module.quant_method.process_weights_after_loading(module)
    assert torch.equal(table.weight, packed)
    assert torch.equal(head.quant_method.apply(head, x_of()), ops.linear(x_of(), packed, "q8_0"))


def test_tables_and_heads_are_packed_while_vllm_loads() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    config = config_of({"isq": "q4k", "exclude": "embed_tokens"})
    table = VocabParallelEmbedding(64, 256, config)
    table.weight.weight_loader(table.weight, w)
    table.quant_method.process_weights_after_loading(table)
    assert torch.equal(table(torch.arange(64)), w), "it is excluded"
    head = ParallelLMHead(64, 256, config, "lm_head")
    assert head.weight.is_meta
    head.weight.weight_loader(head.weight, w)
    head.quant_method.process_weights_after_loading(head)
    assert torch.equal(head.weight, ops.quantize(w, "q6k")), "heads of q4k are promoted to q6k"


@pytest.mark.filterwarnings("error")
def test_other_layers_are_none_of_its_business() -> None:
    assert config_of({"isq": 4}).get_quant_method(torch.nn.Identity(), "model.layers.0.self_attn.attn") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"isq": "q9"}, "q9"),
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
    layer = LinearBase(256, SIZES, config_of({"isq": "q6k"}), f"{ATTENTION}.qkv_proj")
    with pytest.warns(UserWarning, match=r"isq in vLLM: 1 layer lost much more than usual: .*q_proj \(q6k\)"):
        load(layer, [weights()[0] * 1e-6, *weights()[1:]])


def test_weights_that_cannot_be_packed_are_named_once() -> None:
    layer = LinearBase(256, SIZES, config_of({"isq": "q6k"}), f"{ATTENTION}.qkv_proj")
    values = weights()
    values[1][0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"^isq in vLLM: .*k_proj: weight\[0, 3\] is nan"):
        load(layer, values)
