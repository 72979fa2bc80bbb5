"""QuantLinear and QuantEmbedding: what a module must survive."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import linear, state_bytes
from torch import Tensor, nn

from isqtorch.formats import formats, get_format
from isqtorch.modules import QuantEmbedding, QuantLinear
from isqtorch.modules.convert import float_weight, layer_kind, obstacle, to_float, to_packed
from isqtorch.ops import reference

FORMATS = formats()
SOME = ("q4_0", "q4k", "q8_0", "afq4", "hqq4", "fp8")


def embedding(fmt: str = "q4k", dtype: torch.dtype = torch.float32) -> QuantEmbedding:
    torch.manual_seed(0)
    return QuantEmbedding.from_float(nn.Embedding(40, 512, padding_idx=3, dtype=dtype), fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_linear_is_the_product_with_the_decoded_weight(fmt: str) -> None:
    layer = linear(fmt)
    x = torch.randn(2, 3, 512)
    want = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    error = (layer(x).double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error <= get_format(fmt).linear_error


@pytest.mark.parametrize("fmt", FORMATS)
def test_embedding_is_rows_of_the_decoded_table(fmt: str) -> None:
    layer = embedding(fmt, torch.bfloat16)
    ids = torch.tensor([[3, 0, 39], [7, 7, 1]])
    out = layer(ids)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 3, 512)
    assert torch.equal(out, layer.dequantize()[ids])
    assert torch.equal(layer.dequantize(), reference.dequantize(layer.weight, fmt, torch.bfloat16))


def test_the_weight_is_a_frozen_parameter_of_bytes() -> None:
    layer = linear()
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    assert layer.weight.dtype == torch.uint8 and layer.weight.shape == (24, 512 // 256 * 144)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    assert layer._hf_quantized_needs_local_tp


def test_repr_names_format_and_bits() -> None:
    layer = QuantLinear(4096, 4096, bias=False, format="Q4_K", device="meta")
    assert repr(layer) == "QuantLinear(in_features=4096, out_features=4096, bias=False, q4k, 4.50 bpw)"
    assert repr(embedding()) == "QuantEmbedding(40, 512, padding_idx=3, q4k, 4.50 bpw)"


def test_the_constructor_makes_zeros_and_meta_allocates_nothing() -> None:
    layer = QuantLinear(512, 8, format="q4k", dtype=torch.bfloat16)
    assert not layer.dequantize().any() and layer.bias.dtype == torch.bfloat16
    assert QuantLinear(512, 8, format="q4k", device="meta").weight.is_meta
    assert QuantEmbedding(8, 512, format="q4k", device="meta").weight.is_meta
    assert QuantLinear(512, 8, format="q4k").to("meta").weight.is_meta


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("make", [linear, embedding])
def test_casts_leave_the_bytes_alone(make, cast: str) -> None:
    layer = make()
    before = bytes(layer.weight.numpy())
    getattr(layer, cast)()
    want = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}[cast]
    assert layer.dtype == want and layer.weight.dtype == torch.uint8 and bytes(layer.weight.numpy()) == before
    if isinstance(layer, QuantLinear):
        assert layer.bias.dtype == want
    if cast != "double":
        assert layer.dequantize().dtype == want


def test_to_and_type_leave_the_bytes_alone() -> None:
    layer = linear()
    before = bytes(layer.weight.numpy())
    assert layer.to(torch.bfloat16).dtype == torch.bfloat16
    assert layer.to("cpu", torch.float16).dtype == torch.float16
    layer.type(torch.float32)  # nn.Module.type casts every parameter, bytes included, if one lets it
    assert layer.dtype == torch.float32 and layer.weight.dtype == torch.uint8
    assert bytes(layer.weight.numpy()) == before
    nn.Sequential(layer).to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16 and layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("fmt", SOME)
def test_forward_does_not_touch_the_state(fmt: str) -> None:
    model = nn.Sequential(embedding(fmt), linear(fmt))
    before = state_bytes(model)
    for rows in (1, 5, 300):
        model(torch.zeros(rows, dtype=torch.long))
    assert state_bytes(model) == before


@pytest.mark.parametrize("make", [linear, embedding])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(make, how: str) -> None:
    layer = make("afq4").bfloat16()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(2, 512).bfloat16() if isinstance(layer, QuantLinear) else torch.tensor([1, 2])
    assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)
    assert other.dtype == torch.bfloat16 and other.origin is layer.origin
    assert other.weight is not layer.weight


def test_deepcopy_keeps_ties() -> None:
    table = embedding()
    head = QuantLinear.from_packed(table.weight, "q4k")
    copied = copy.deepcopy(nn.ModuleDict({"table": table, "head": head}))
    assert copied["table"].weight is copied["head"].weight is not table.weight


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    layer = linear("q5k")
    other = QuantLinear(512, 24, format="q5k")
    result = other.load_state_dict(layer.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert state_bytes(other) == state_bytes(layer) and not other.weight.requires_grad


def test_load_state_dict_into_meta() -> None:
    layer, other = linear(), QuantLinear(512, 24, format="q4k", device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(torch.ones(1, 512)), layer(torch.ones(1, 512)))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_floats_is_an_error_not_a_cast(assign: bool) -> None:
    layer = linear()
    floats = {"weight": torch.randn(layer.weight.shape), "bias": torch.zeros(24)}
    with pytest.raises(RuntimeError, match=r"holds q4k bytes and cannot load torch.float32 weights"):
        layer.load_state_dict(floats, assign=assign)
    assert layer.weight.dtype == torch.uint8


def test_loading_another_format_of_the_same_size_is_an_error() -> None:
    assert linear("q4_0").weight.shape == linear("q4k").weight.shape
    with pytest.raises(RuntimeError, match=r"0.weight: this layer is q4k, the state dict holds q4_0"):
        nn.Sequential(linear("q4k")).load_state_dict(nn.Sequential(linear("q4_0")).state_dict())


def test_reset_parameters() -> None:
    for layer in (linear(), embedding()):
        layer.reset_parameters()
        assert not layer.dequantize().any()


def test_k_comes_from_the_bytes() -> None:
    """A tensor-parallel shard has fewer columns than `in_features` says."""
    layer = linear(bias=False)
    whole = layer.dequantize()
    layer.weight = nn.Parameter(layer.weight.data[:, :144].contiguous(), requires_grad=False)
    x = torch.randn(3, 256)
    assert layer.in_features == 512
    assert layer.dequantize().shape == (24, 256)
    torch.testing.assert_close(layer(x), x @ whole[:, :256].t(), rtol=0.05, atol=0.05)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = embedding("q4k")
        self.proj = linear("q4k")

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.table(ids)).relu()


def test_compile_fullgraph() -> None:
    model = TwoLayers().eval()
    ids = torch.arange(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), model(ids))
    assert torch.equal(compiled(ids[:3]), model(ids[:3]))


@pytest.mark.slow
def test_compile_with_the_default_backend() -> None:
    model = TwoLayers().eval()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(torch.arange(6)), model(torch.arange(6)))


def test_export() -> None:
    model = TwoLayers().eval()
    exported = torch.export.export(model, (torch.arange(6),))
    assert torch.equal(exported.module()(torch.arange(6)), model(torch.arange(6)))
    assert any("isqtorch.linear" in str(node.target) for node in exported.graph.nodes)


def test_inference_mode_makes_no_inference_tensors() -> None:
    with torch.inference_mode():
        layer = linear()
    assert not layer.weight.is_inference()


# ---- conversion ------------------------------------------------------------------------------------------------------


class MyLinear(nn.Linear):
    pass


def test_only_exact_types_are_converted() -> None:
    assert layer_kind(nn.Linear(2, 2)) == "linear" and layer_kind(nn.Embedding(2, 2)) == "embedding"
    for module in (MyLinear(2, 2), nn.Bilinear(2, 2, 2), nn.Conv1d(2, 2, 1), nn.EmbeddingBag(2, 2), linear()):
        assert layer_kind(module) is None


def test_conv1d_is_known_by_name_and_comes_back() -> None:
    transformers = pytest.importorskip("transformers.pytorch_utils")
    conv = transformers.Conv1D(24, 512)
    nn.init.normal_(conv.bias)
    assert layer_kind(conv) == "conv1d"
    packed = torch.ops.isqtorch.quantize(conv.weight.detach().t(), "q8_0")
    layer = to_packed(conv, nn.Parameter(packed, requires_grad=False), get_format("q8_0"))
    x = torch.randn(3, 512)
    torch.testing.assert_close(layer(x), conv(x), rtol=0.05, atol=0.05)
    back = to_float(layer, float_weight(layer))
    assert type(back) is transformers.Conv1D and back.weight.shape == (512, 24)
    torch.testing.assert_close(back(x), layer(x), rtol=0.02, atol=0.02)


def test_conversion_carries_hooks_training_and_grad_flags() -> None:
    layer = nn.Linear(64, 8).train()
    layer.bias.requires_grad_(False)
    calls = []
    handle = layer.register_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    packed = nn.Parameter(torch.ops.isqtorch.quantize(layer.weight.detach(), "q8_0"), requires_grad=False)
    new = to_packed(layer, packed, get_format("q8_0"))
    assert new.training and new.bias is layer.bias and not new.bias.requires_grad
    new(torch.zeros(1, 64))
    assert calls == ["QuantLinear"]
    back = to_float(new, float_weight(new))
    back(torch.zeros(1, 64))
    assert calls == ["QuantLinear", "Linear"] and back.weight.requires_grad
    handle.remove()  # the handle of the original works on what replaced it
    back(torch.zeros(1, 64))
    assert len(calls) == 2


def test_obstacles() -> None:
    assert obstacle(nn.Linear(2, 2)) is None
    assert "max_norm" in str(obstacle(nn.Embedding(2, 2, max_norm=1.0)))
    assert "scale_grad_by_freq" in str(obstacle(nn.Embedding(2, 2, scale_grad_by_freq=True)))
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # what accelerate does to offload
    assert "forward was replaced" in str(obstacle(patched))
    computed = nn.Linear(2, 2)  # weight norm, before it became a parametrization
    del computed.weight
    computed.weight = torch.ones(2, 2)
    assert "computed" in str(obstacle(computed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_for_a_float_layer(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    quantized = nn.Sequential(QuantLinear.from_float(model[0], "q8_0"), model[1], model[2])
    x = torch.randn(3, 256, requires_grad=True)
    with torch.autocast("cpu", dtype):
        assert quantized[0](x).dtype == model[0](x).dtype == dtype
        got, want = quantized(x), model(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    assert quantized[0](x).dtype == torch.float32
    got.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        assert compiled(x).dtype == want.dtype


def test_forward_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(QuantEmbedding(10, 256, format="q6k"), QuantLinear(256, 8, format="q4k"))
        y = model(torch.zeros(2, 3, dtype=torch.int64))
    assert y.shape == (2, 3, 8) and y.device.type == "meta"
