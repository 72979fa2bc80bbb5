"""quantize_, dequantize_ and requantize_ from stored weights on whole models, and the report."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from models import ConvNet, MoEModel, mlp, state_bytes, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

from isqtorch.formats import formats, get_format
from isqtorch.imatrix import Imatrix
from isqtorch.modules import QuantEmbedding, QuantLinear
from isqtorch.quantize import dequantize_, quantize_
from isqtorch.report import QuantReport
from isqtorch.requantize import requantize_

IDS = torch.arange(24).view(2, 12) % 60


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def formats_of(report: QuantReport) -> dict[str, str | None]:
    return {layer.name: layer.stored for layer in report.layers}


def real_bytes(model: nn.Module) -> int:
    """Parameters and saved buffers, each stored one once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values() if t.numel()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


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
    assert relative(logits(model), before) < 6 * max(layer.error or 0 for layer in report.layers) + 0.02


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
    assert relative(logits(model), before) < 0.5
    dequantize_(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.model.embed_tokens) is nn.Embedding


def test_llama_with_hidden_288_falls_back_and_says_so() -> None:
    model = tiny_llama(hidden=288)
    report = quantize_(model, 4)
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
    assert relative(logits(model), before) < 0.05
    quantized = logits(model)
    dequantize_(model)
    assert repr(model) == repr(original)
    assert relative(logits(model), quantized) < 0.02
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
    assert relative(logits(model), before) < 0.05


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
        f"0.{name}": "Reader reads its weight directly" for name in ("read", "cast", "list.0")
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


# ---- what a quantized model must survive -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_gpt2, tiny_bert, lambda: tiny_llama(tied=True)], ids=["llama", "gpt2", "bert", "tied"]
)
def test_life_of_a_quantized_model(build) -> None:
    model = build()
    quantize_(model, 4)
    state, want = state_bytes(model), logits(model)
    assert state_bytes(model) == state, "a forward changed the state"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want) and state_bytes(other) == state
    fresh = build()
    quantize_(fresh, 4)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), want)
    packed = {name: raw for name, raw in state.items() if model.state_dict()[name].dtype == torch.uint8}
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16 and packed.items() <= state_bytes(model).items()
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())


def test_compile_fullgraph() -> None:
    model = mlp()
    quantize_(model, 4)
    x = torch.randn(3, 256)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_generate() -> None:
    model = tiny_llama(tied=True)
    quantize_(model, 4)
    out = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 16)


def test_originals_are_freed() -> None:
    model = mlp()
    weights = [weakref.ref(layer.weight) for layer in model]
    modules = [weakref.ref(layer) for layer in model]
    quantize_(model, "q8_0")
    gc.collect()
    assert [ref() for ref in weights + modules] == [None] * 6


def test_works_in_inference_mode() -> None:
    model = mlp()
    with torch.inference_mode():
        quantize_(model, "q8_0")
    assert not model[0].weight.is_inference()
    model(torch.randn(1, 256, requires_grad=True)).sum().backward()


def test_strange_weights() -> None:
    """Half precision, transposed memory, a view into a larger tensor, one row."""
    model = nn.Sequential(nn.Linear(64, 32).half(), nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 1))
    model[1].weight = nn.Parameter(torch.randn(64, 32).t())
    model[2].weight = nn.Parameter(torch.randn(40, 65)[8:, 1:])
    weights = [layer.weight.detach().clone() for layer in model]
    quantize_(model, "q8_0")
    for layer, weight in zip(model, weights, strict=True):
        want = torch.ops.isqtorch.quantize(weight.float().contiguous(), "q8_0")
        assert torch.equal(layer.weight, want)
    assert model[0].dtype == torch.float16


# ---- options ---------------------------------------------------------------------------------------------------------


def test_topology_include_exclude() -> None:
    model = tiny_llama()
    report = quantize_(model, "q4k", topology={"0-1": "q8_0", "/k_proj/": None, "/lm_head/": "q5k"}, exclude=["o_proj"])
    assert report["model.layers.0.mlp.up_proj"].stored == "q8_0"
    assert report["model.layers.1.mlp.up_proj"].stored == "q4k"
    assert report["model.layers.0.self_attn.k_proj"].stored is None
    assert report["model.layers.0.self_attn.o_proj"].reason == "excluded by 'o_proj'"
    assert report["lm_head"].stored == "q5k"


def test_topology_from_yaml_without_a_default(tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text("0: q8_0\n")
    model = tiny_llama()
    report = quantize_(model, None, topology=path)
    assert {layer.name.split(".")[2] for layer in report.quantized} == {"0"} and len(report.quantized) == 7


def test_what_matches_nothing_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="topology entry '9' matches no layer"):
        report = quantize_(mlp(), "q8_0", topology={"9": "q4k"})
    assert "topology entry '9' matches no layer" in report.notes
    with pytest.warns(UserWarning, match="quantize_ quantized nothing"):
        quantize_(mlp(), "q8_0", exclude=["."])


def test_devices(recwarn: pytest.WarningsRecorder) -> None:
    model = mlp()
    quantize_(model, "q8_0", device="cpu", topology={"/0/": {"device": "cpu"}})
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_rule_reaches_the_quantizer() -> None:
    weight = mlp(depth=1)[0].weight.detach()
    model = mlp(depth=1)
    quantize_(model, "afq2", rule="mlx")
    assert torch.equal(model[0].weight, torch.ops.isqtorch.quantize(weight, "afq2", None, "mlx"))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(mlp(), "q8_0", progress=True)
    assert "quantize_" in capsys.readouterr().err
    quantize_(mlp(), "q8_0", progress=False)
    quantize_(mlp(), "q8_0")  # stderr is no terminal here
    assert capsys.readouterr().err == ""


# ---- importance ------------------------------------------------------------------------------------------------------


def ramp(columns: int = 256) -> torch.Tensor:
    return torch.linspace(0.01, 1, columns)


def test_importance_from_a_dict() -> None:
    model, plain = mlp(), mlp()
    weight = model[1].weight.detach()
    report = quantize_(model, "q4k", imatrix={"1": ramp()})
    quantize_(plain, "q4k")
    assert torch.equal(model[1].weight, torch.ops.isqtorch.quantize(weight, "q4k", ramp()))
    assert not torch.equal(model[1].weight, plain[1].weight) and torch.equal(model[0].weight, plain[0].weight)
    assert report.notes == ["2 layers have no entry in the importance matrix and were quantized without: 0, 2"]


def test_importance_from_a_file_and_an_object(tmp_path: Path) -> None:
    path = tmp_path / "x.cimatrix"
    name = b"1"
    path.write_bytes(
        (1).to_bytes(8, "little")
        + len(name).to_bytes(8, "little")
        + name
        + (256).to_bytes(8, "little")
        + ramp().numpy().tobytes()
    )
    models = [mlp(), mlp(), mlp()]
    for model, imatrix in zip(models, (path, Imatrix({"1": ramp()}), {"1": ramp()}), strict=True):
        quantize_(model, "q4k", imatrix=imatrix)
    assert torch.equal(models[0][1].weight, models[2][1].weight) and torch.equal(
        models[1][1].weight, models[2][1].weight
    )


def test_formats_without_importance_are_noted() -> None:
    report = quantize_(mlp(), "q8_0", imatrix={"0": ramp()})
    assert report.notes == ["3 layers have formats that take no importance: 0, 1, 2"]


def test_tied_weights_use_the_heads_importance() -> None:
    model = tiny_llama(tied=True)
    weight = model.lm_head.weight.detach().clone()
    quantize_(model, "q4k", imatrix={"lm_head": ramp()})
    assert torch.equal(model.lm_head.weight, torch.ops.isqtorch.quantize(weight, "q6k", ramp()))


def test_dead_columns_are_warned_about() -> None:
    vector = ramp()
    vector[32:48] = 0
    with pytest.warns(UserWarning, match="importance of 1 is zero for columns 32 to 47"):
        quantize_(mlp(), "q4k", imatrix={"1": vector})


# ---- back and over ---------------------------------------------------------------------------------------------------


def test_dequantize_gives_the_weights_it_computed_with() -> None:
    model = tiny_llama()
    original = copy.deepcopy(model)
    quantize_(model, "q6k")
    want = {
        name: layer.dequantize()
        for name, layer in model.named_modules()
        if isinstance(layer, (QuantLinear, QuantEmbedding))
    }
    dequantize_(model)
    assert repr(model) == repr(original)
    for name, weight in want.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and all(
        p.requires_grad for p in model.parameters()
    )
    quantize_(model, "q6k")
    dequantize_(model, torch.float32)
    assert model.lm_head.weight.dtype == torch.float32


def test_requantize_starts_from_what_is_stored() -> None:
    model = mlp()
    quantize_(model, "q8_0", exclude=["2"])
    stored = model[0].dequantize()
    report = requantize_(model, "q4_0", source="stored", exclude=["1"], measure_error=True)
    assert formats_of(report) == {"0": "q4_0", "1": "q8_0", "2": "q4_0"}
    assert report["1"].reason == "excluded by '1'; stays q8_0" and report["0"].dtype == "q8_0"
    assert torch.equal(model[0].weight, torch.ops.isqtorch.quantize(stored, "q4_0"))
    assert report["0"].bytes_before == 256 * 272 and report["0"].bytes_after == 256 * 144
    assert report["0"].error is not None and report["1"].error is None
    again = state_bytes(model)
    report = requantize_(model, "q4_0", source="stored", exclude=["1"])
    assert report["0"].reason == "is q4_0 already" and state_bytes(model) == again


def test_requantize_keeps_ties_and_origins() -> None:
    model = tiny_gpt2()
    quantize_(model, "q8_0")
    requantize_(model, "q4k", source="stored")
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.format == "q6k"
    dequantize_(model)
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"


# ---- nothing is touched when something is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"imatrix": {"0": ramp(128)}}, {"rule": "nonsense"}, {"fallback": "never"}, {"topology": {"x": 4}}]
)
def test_a_bad_request_changes_nothing(options) -> None:
    model = mlp()
    before = state_bytes(model)
    with pytest.raises(ValueError):
        quantize_(model, "q4k", **options)
    assert state_bytes(model) == before and all(type(layer) is nn.Linear for layer in model)


def test_a_bad_weight_changes_nothing_and_is_named() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 17] = float("nan")
    with pytest.raises(
        ValueError, match=r"quantize_: model\.layers\.1\.mlp\.up_proj\.weight\[3, 17\] is nan; weights must be finite"
    ):
        quantize_(model, 4)
    assert type(model.lm_head) is nn.Linear
    quantize_(model, 4, exclude=["layers.1.mlp.up_proj"])


# ---- report ----------------------------------------------------------------------------------------------------------


def test_the_report_is_a_table() -> None:
    report = quantize_(tiny_llama(hidden=288), 4, measure_error=True)
    text = str(report)
    table = text.split("\n\n")[0].splitlines()
    head = table[0]
    assert head.split() == ["layer", "shape", "asked", "stored", "bpw", "before", "after", "error", "reason"]
    assert len(table) == 2 + len(report.layers)
    column = head.index("stored")
    for line, layer in zip(table[2:], report.layers, strict=True):
        assert line.startswith(layer.name) and line[column:].startswith(layer.stored or layer.dtype)
        assert line.endswith(layer.reason)
    assert "16 of 16 weights quantized (2 promoted, 14 fell back to another format), 0 left as they are" in text
    assert f"{report.bits_per_weight:.2f} bits per weight over the whole model" in text


def test_the_report_as_json_and_markdown() -> None:
    report = quantize_(ConvNet(), "q8_0")
    data = json.loads(report.to_json())
    assert data["bytes_after"] == report.bytes_after and data["layers"][1]["stored"] == "q8_0"
    assert data["layers"][0]["reason"] == "convolutions are never quantized" and data["planned"] is False
    lines = report.to_markdown().splitlines()
    assert lines[0].startswith("| layer | shape |") and set(lines[1]) <= set("|-: ")
    assert "| fc | 64 x 128 | q8_0 | q8_0 | 8.50 |" in report.to_markdown()
    with pytest.raises(KeyError):
        report["nope"]


def test_quantize_warns_about_nothing_else() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(tiny_llama(tied=True), 4)


def test_the_report_says_where_the_reference_runs() -> None:
    from isqtorch.inventory import Inventory
    from isqtorch.policy import LayerInfo, Request, decide
    from isqtorch.prepare import _kernel_notes

    layers = [
        LayerInfo(f"{d}.up", "linear", (8, 256), torch.bfloat16, device_type=d) for d in ("cpu", "mps", "cuda", "xpu")
    ]
    notes = _kernel_notes(Inventory(layers, 0, 0), decide(layers, Request("q4k")))
    assert [note.split(" for ")[1].split(" ")[0] for note in notes] == ["cuda", "xpu"]
    assert _kernel_notes(Inventory(layers[:1], 0, 0), decide(layers[:1], Request("q4k"))) == []


@pytest.mark.parametrize("fmt", ["q4_1", "q2k", "q8_0", "hqq4"])
def test_weights_too_large_for_the_scales_are_refused_before_anything_changes(fmt: str) -> None:
    model = nn.Sequential(nn.Linear(256, 8), nn.Linear(256, 8))
    with torch.no_grad():
        model[1].weight.fill_(1e9)
        model[1].weight[:, ::2] *= -1
    with pytest.raises(
        ValueError, match=rf"^quantize_: 1: quantize: the block of {fmt} from weight\[0, 0\].*Nothing was"
    ):
        quantize_(model, fmt)
    assert all(type(layer) is nn.Linear for layer in model)
    quantize_(model, "q8k")  # the way out that the message names
    assert all(type(layer) is QuantLinear for layer in model)
