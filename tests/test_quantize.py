"""quantize_ on whole models: which weights get which format, which stay as they are and why, and what shares a weight."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import formats_of, relative_error
from models import IDS, ConvNet, MoEModel, logits, mlp, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

from isqtorch.formats import formats, get_format
from isqtorch.inplace.dequantize import dequantize_
from isqtorch.inplace.quantize import quantize_
from isqtorch.modules import QuantEmbedding, QuantLinear


def real_bytes(model: nn.Module) -> int:
    """Parameters and saved buffers, each stored one once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values() if t.numel()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", formats())
def test_llama_in_every_format(fmt: str) -> None:
    model = tiny_llama(layers=1)
    before, size = logits(model), real_bytes(model)
    report = quantize_(model, fmt, measure_error=True)
    assert real_bytes(model) == report.bytes_after < report.bytes_before == size
    assert not report.left and {layer.requested for layer in report.layers} == {fmt}
    assert report["model.layers.0.mlp.up_proj"].stored == fmt
    for name in ("model.embed_tokens", "lm_head"):
        assert report[name].stored == (get_format(fmt).promoted or fmt)
        assert bool(report[name].reason) == report[name].promoted == (get_format(fmt).promoted not in (None, fmt))
    for layer in report.layers:
        assert layer.error is not None and 0 < layer.error < get_format(layer.stored or "").weight_error
    # twice the weight error is generous for two layers of random weights; it catches rows or blocks in the wrong place
    assert relative_error(logits(model), before) < 6 * max(layer.error or 0 for layer in report.layers) + 0.02


def test_tied_llama_shares_one_weight_before_and_after() -> None:
    model = tiny_llama(tied=True)
    before = logits(model)
    report = quantize_(model, "q4k")
    head, table = model.lm_head, model.model.embed_tokens
    assert type(head) is QuantLinear and type(table) is QuantEmbedding and head.weight is table.weight
    assert report["model.embed_tokens"].stored == report["lm_head"].stored == "q6k"
    assert report["lm_head"].tied_to == "model.embed_tokens" and report["lm_head"].bytes_after == 0
    assert report["lm_head"].reason == "shares the weight of model.embed_tokens"
    assert report.bytes_after == real_bytes(model)
    model.tie_weights()
    model.to(torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert relative_error(logits(model), before) < 0.5
    dequantize_(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.model.embed_tokens) is nn.Embedding


def test_llama_with_hidden_288_falls_back_and_says_so() -> None:
    model = tiny_llama(hidden=288)
    report = quantize_(model, "q4k")
    up, down, head = report["model.layers.0.mlp.up_proj"], report["model.layers.0.mlp.down_proj"], report["lm_head"]
    assert (up.requested, up.stored, up.fell_back) == ("q4k", "q5_0", True)
    assert up.reason == "288 columns are not a multiple of 256, which q4k needs: q5_0 instead"
    assert down.stored == "q5_0"  # 576
    assert report["model.layers.0.self_attn.o_proj"].stored == "q4k"  # 4 heads of 64
    assert (head.stored, head.promoted, head.fell_back) == ("q8_0", True, True)
    assert "promoted from q4k to q6k" in head.reason and "q8_0 instead" in head.reason
    assert len(report.fallbacks) == 2 * 6 + 2 and len(report.promoted) == 2
    assert logits(model).isfinite().all()


def test_gpt2_conv1d_there_and_back() -> None:
    model = tiny_gpt2()
    original, before = copy.deepcopy(model), logits(model)
    report = quantize_(model, "q8_0")
    attn = model.transformer.h[0].attn.c_attn
    assert type(attn) is QuantLinear and (attn.in_features, attn.out_features) == (256, 768)
    assert report["transformer.h.0.attn.c_attn"].shape == (768, 256)
    assert report["transformer.wpe"].stored is None and "position" in report["transformer.wpe"].reason
    assert model.lm_head.weight is model.transformer.wte.weight
    assert relative_error(logits(model), before) < 0.05
    quantized = logits(model)
    dequantize_(model)
    assert repr(model) == repr(original)
    assert relative_error(logits(model), quantized) < 0.02
    assert model.transformer.h[0].attn.c_attn.weight.shape == (256, 768)


def test_bert() -> None:
    model = tiny_bert()
    before = logits(model)
    report = quantize_(model, 8)
    assert report["bert.embeddings.word_embeddings"].stored == "q8_0"
    for name in ("position_embeddings", "token_type_embeddings"):
        assert report[f"bert.embeddings.{name}"].stored is None
    assert report["cls.predictions.decoder"].tied_to == "bert.embeddings.word_embeddings"
    assert model.cls.predictions.decoder.bias is not None
    assert relative_error(logits(model), before) < 0.05


def test_sequential_keeps_flags_hooks_and_biases() -> None:
    model = mlp()
    model[1].bias.requires_grad_(False)
    model[2].train()
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    biases = [layer.bias for layer in model]
    quantize_(model, "q8_0")
    assert [layer.bias is bias for layer, bias in zip(model, biases, strict=True)] == [True] * 3
    assert [layer.bias.requires_grad for layer in model] == [True, False, True]
    assert [layer.training for layer in model] == [False, False, True]
    x = torch.randn(2, 256, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["QuantLinear"] and x.grad is not None and model[0].bias.grad is not None


def test_conv_net_accounts_for_every_parameter() -> None:
    model = ConvNet().eval()
    before = model(torch.ones(1, 3, 8, 8))
    report = quantize_(model, "q8_0")
    assert formats_of(report) == {"conv": None, "fc": "q8_0", "small": "q8_0"}
    assert report["conv"].reason == "convolutions are never quantized" and report["conv"].shape == (32, 3, 3, 3)
    assert report.bytes_after == real_bytes(model)
    total = sum(p.numel() for p in ConvNet().state_dict().values())
    assert report.numel == total
    torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)), before, rtol=0.05, atol=0.05)


def test_moe() -> None:
    model = MoEModel().eval()
    report = quantize_(copy.deepcopy(model), 4)
    assert report["layers.0.mlp.gate"].stored is None and "router" in report["layers.0.mlp.gate"].reason
    assert report["layers.0.mlp.shared_expert_gate"].stored is None
    assert report["layers.1.mlp.experts.3"].stored == report["layers.1.mlp.shared_experts"].stored == "q4k"
    report = quantize_(model, 4, organization="moqe")
    quantized = {layer.name for layer in report.quantized}
    assert quantized == {f"layers.{i}.mlp.experts.{e}" for i in range(2) for e in range(4)}
    assert model(IDS).isfinite().all()


def test_fused_experts_and_raw_parameters_are_reported() -> None:
    class TinyExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32))
            self.register_buffer("table", torch.zeros(3, 3))

    model = nn.ModuleDict({"experts": TinyExperts(), "proj": nn.Linear(32, 32), "rnn": nn.GRU(32, 32)})
    report = quantize_(model, "q8_0")
    assert (
        report["experts.gate_up_proj"].reason == "TinyExperts are fused experts with code of their own: not quantized"
    )
    assert "GRU reads its weights directly" in report["rnn.weight_ih_l0"].reason
    assert report.numel == sum(
        t.numel()
        for t in nn.ModuleDict({"e": TinyExperts(), "p": nn.Linear(32, 32), "r": nn.GRU(32, 32)}).state_dict().values()
    )


def test_modules_whose_weight_is_read_directly_stay() -> None:
    class Special(nn.Linear):
        pass

    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    model = nn.ModuleDict({"encoder": encoder, "special": Special(64, 64), "plain": nn.Linear(64, 64)})
    report = quantize_(model, "q8_0")
    assert formats_of(report) == {
        "encoder.self_attn.in_proj_weight": None,
        "encoder.self_attn.out_proj": None,
        "encoder.linear1": None,
        "encoder.linear2": None,
        "special": None,
        "plain": "q8_0",
    }
    assert report["encoder.linear1"].reason == "TransformerEncoderLayer reads its weight directly"
    assert report["special"].reason == "Special is a subclass of nn.Linear with code of its own: not quantized"
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 64)).isfinite().all()


def test_layers_that_code_reads_from_outside_stay() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read, self.cast, self.sized, self.set = (nn.Linear(64, 64) for _ in range(5))
            self.list = nn.ModuleList([nn.Linear(64, 64)])
            self.read.weight.data.mul_(1)

        def tie_weights(self) -> None:
            self.called.weight

        @property
        def dtype(self) -> torch.dtype:
            return self.cast.weight.dtype

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(x.to(self.dtype), self.read.weight)  # not self.called.weight
            x = x + self.list[0].weight.sum()
            return self.called(x[:, : self.sized.weight.shape[0]])

        def swap(self) -> None:
            self.set.weight = None

    report = quantize_(nn.Sequential(Reader()), "q8_0")
    assert {layer.name: layer.reason for layer in report.left} == {
        f"0.{name}": "Reader reads its weight directly" for name in ("read", "list.0")
    }


def test_modules_that_the_model_keeps_in_float32_stay() -> None:
    model = mlp()
    model._keep_in_fp32_modules = ["1"]
    report = quantize_(model, "q8_0")
    assert formats_of(report) == {"0": "q8_0", "1": None, "2": "q8_0"}
    assert report["1"].reason == "the model keeps it in float32 (_keep_in_fp32_modules)"


def test_embeddings_that_rewrite_themselves_stay() -> None:
    model = nn.Sequential(nn.Embedding(8, 64, max_norm=1.0), nn.Linear(64, 64))
    assert "max_norm" in quantize_(model, "q8_0")["0"].reason


# ---- sharing ---------------------------------------------------------------------------------------------------------


def test_one_module_under_two_names_is_replaced_at_both() -> None:
    shared = nn.Linear(64, 64)
    block = nn.Sequential(nn.Linear(64, 64))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": block, "d": block})
    report = quantize_(model, "q8_0")
    assert model["a"] is model["b"][0] and type(model["a"]) is QuantLinear
    assert model["c"] is model["d"] and type(model["c"][0]) is QuantLinear
    assert report["b.0"].tied_to == "a" and report["d.0"].tied_to == "c.0"
    assert report.bytes_after == real_bytes(model)
    assert len(report.quantized) == 2
    dequantize_(model)
    assert model["a"] is model["b"][0] and type(model["c"][0]) is nn.Linear


def test_the_same_storage_counts_as_the_same_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    report = quantize_(model, "q8_0")
    assert model[0].weight is model[1].weight and model[0].bias is not model[1].bias
    assert report["1"].tied_to == "0"


def test_a_weight_shared_with_something_else_stays() -> None:
    class Raw(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.table = weight

    linear = nn.Linear(64, 64)
    report = quantize_(nn.ModuleDict({"linear": linear, "raw": Raw(linear.weight), "other": nn.Linear(64, 64)}), "q8_0")
    assert formats_of(report) == {"linear": None, "raw.table": None, "other": "q8_0"}
    assert report["linear"].reason.startswith("as raw.table, which shares the weight: a parameter of Raw itself")


def test_a_layer_that_a_plain_list_holds_too_stays() -> None:
    """Its forward takes the layer from the list, where nothing would replace it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(256, 64), nn.ReLU()]
            for i, layer in enumerate(self.layers):
                self.add_module(str(i), layer)
            self.last = nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.last(x)

    model = Block()
    report = quantize_(model, "q8_0")
    assert [layer.name for layer in report.quantized] == ["last"]
    assert (
        report["0"].reason == "the plain list 'layers' of Block holds it as well"
        and model.layers[0] is model._modules["0"]
    )
