"""`activations="fp8"` from quantize_ to files and back: who gets it, who keeps it, who refuses it, and what is said of it."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MoEModel, mlp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.library import opcheck

import isqtorch
from isqtorch import checkpoint, dequantize_, explain, ops, plan, quantize_, requantize_
from isqtorch.cli import main
from isqtorch.modules import QuantLinear
from isqtorch.ops import native

DEMO = str(Path(__file__).resolve().parent.parent / "examples/demo_model/model")


def permitted(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear) and layer.activations]


def model_in_fp8(**options: Any) -> nn.Sequential:
    model = mlp()
    quantize_(model, "fp8", activations="fp8", **options)
    return model


# ---- the operator -----------------------------------------------------------------------------------------------------


def test_where_nothing_rounds_it_is_linear() -> None:
    x, packed = torch.randn(200, 256), ops.quantize(torch.randn(32, 256), "fp8")
    bias = torch.randn(32)
    for m in (1, 200):
        want = ops.linear(x[:m], packed, "fp8", bias)
        assert torch.equal(torch.ops.isqtorch.linear_w8a8(x[:m], packed, "fp8", bias), want)
        assert torch.equal(torch.ops.isqtorch.linear_w8a8_frozen(x[:m], packed, "fp8", bias), want)


def test_schema_gradient_and_tracing() -> None:
    x, packed = torch.randn(3, 256, requires_grad=True), ops.quantize(torch.randn(6, 256), "fp8")
    bias = torch.randn(6, requires_grad=True)
    opcheck(torch.ops.isqtorch.linear_w8a8.default, (x, packed, "fp8", bias))
    opcheck(torch.ops.isqtorch.linear_w8a8_frozen.default, (x.detach(), packed, "fp8"))
    gradients = [
        torch.autograd.grad(op(x, packed, "fp8", bias).square().sum(), (x, bias))
        for op in (torch.ops.isqtorch.linear_w8a8, ops.linear)
    ]
    assert all(map(torch.equal, *gradients))


def test_fakes_refuse_what_kernels_refuse() -> None:
    x, packed = torch.randn(3, 256), ops.quantize(torch.randn(6, 256), "q4k")
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match='linear_w8a8: activations are rounded .* got "q4k". Use linear.'):
            torch.ops.isqtorch.linear_w8a8(x.to(device), packed.to(device), "q4k")


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "Meta"])
def test_every_device_has_it(key: str) -> None:
    for name in ("linear_w8a8", "linear_w8a8_frozen"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"isqtorch::{name}", key), name


# ---- the layer --------------------------------------------------------------------------------------------------------


def test_a_layer_calls_the_operator_that_may_round() -> None:
    layer = model_in_fp8()[0].requires_grad_(False)
    x = torch.randn(200, 256)
    want = ops.linear(x, layer.weight, "fp8", layer.bias)
    assert torch.equal(layer(x), want) and torch.equal(layer(x.requires_grad_()).detach(), want)
    exported = torch.export.export(layer, (torch.randn(1, 256),))
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.isqtorch.linear_w8a8.default]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x).detach(), want)
    layer.activations = None
    exported = torch.export.export(layer, (torch.randn(1, 256),))
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"] == [torch.ops.isqtorch.linear.default]


def test_a_layer_shows_and_keeps_it() -> None:
    layer = model_in_fp8()[0]
    assert "fp8, 8.25 bpw, activations=fp8" in repr(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
        assert copied.activations == "fp8"
    layer.activations = None
    assert "activations" not in repr(layer)


def test_a_layer_refuses_what_it_cannot_have() -> None:
    with pytest.raises(
        ValueError, match="activations must be None, or .fp8. for a weight in fp8; got 'fp8' for one in q8_0"
    ):
        QuantLinear(32, 4, format="q8_0").activations = "fp8"
    with pytest.raises(ValueError, match="got 'int8' for one in fp8"):
        QuantLinear(128, 4, format="fp8").activations = "int8"


# ---- quantize_, plan --------------------------------------------------------------------------------------------------


def test_linear_layers_in_fp8_get_it_and_no_others() -> None:
    model = nn.Sequential(nn.Embedding(8, 256), mlp())
    report = quantize_(model, "fp8", activations="fp8", topology={"/1.1/": "q8_0"})
    assert permitted(model) == ["1.0", "1.2"]
    assert any("2 linear layers may round x to FP8" in note for note in report.notes)
    assert permitted(mlp()) == []
    dequantize_(model)
    assert not any(hasattr(layer, "activations") for layer in model.modules())


def test_experts_are_told_apart() -> None:
    model = MoEModel()
    report = quantize_(model, "fp8", activations="fp8")
    assert permitted(model)
    fused = [layer for layer in report.layers if layer.kind == "experts" and layer.stored == "fp8"]
    assert bool(fused) == any("has no effect on experts" in note for note in report.notes)


def test_without_the_option_nothing_has_it() -> None:
    model = mlp()
    report = quantize_(model, "fp8")
    assert not permitted(model) and not any("activations" in note for note in report.notes)


def test_it_is_refused_where_nothing_would_use_it() -> None:
    model, before = mlp(), repr(mlp())
    for call in (quantize_, plan):
        with pytest.raises(
            ValueError, match=rf'{call.__name__}: activations="fp8" is for linear layers in fp8, and none will'
        ):
            call(model, "q8_0", activations="fp8")
        with pytest.raises(ValueError, match=f"{call.__name__}: activations must be None or \"fp8\"; got 'int8'"):
            call(model, "fp8", activations="int8")
    with pytest.raises(ValueError, match="none will be"):
        quantize_(nn.Sequential(nn.Embedding(8, 256)), "fp8", activations="fp8")  # a table alone multiplies nothing
    assert repr(model) == before


def test_plan_foresees_it() -> None:
    report = plan(mlp(), "fp8", activations="fp8")
    assert any("3 linear layers may round x to FP8" in note for note in report.notes)


def test_auto_decides_first_who_is_fp8() -> None:
    model = mlp()
    report = quantize_(model, "auto", target_bpw=8.4, formats=["q2k", "fp8"], activations="fp8")
    assert permitted(model) == [layer.name for layer in report.layers if layer.stored == "fp8"] != []
    with pytest.raises(ValueError, match="none will be"):
        quantize_(mlp(), "auto", target_bpw=8.6, formats=["q2k", "q8_0"], activations="fp8")


# ---- requantize_ ------------------------------------------------------------------------------------------------------


def test_it_survives_while_there_is_fp8() -> None:
    model = model_in_fp8(topology={"/^1$/": "q8_0"})
    assert permitted(model) == ["0", "2"]
    requantize_(model, "fp8", source="stored", topology={})
    assert permitted(model) == ["0", "1", "2"]
    requantize_(model, "q8_0", source="stored", include="^1$")  # the others stay as they are
    assert permitted(model) == ["0", "2"]


def test_it_is_dropped_with_fp8_or_on_demand() -> None:
    model = model_in_fp8()
    with pytest.raises(ValueError, match=r'requantize_: activations="fp8" .* Use fp8, or leave activations out'):
        requantize_(model, "q8_0", source="stored", activations="fp8")
    assert permitted(model) == ["0", "1", "2"]
    report = requantize_(model, "q8_0", source="stored")
    assert not permitted(model)
    assert 'activations="fp8" is dropped: no linear layer is in fp8 any more' in report.notes
    model = model_in_fp8()
    report = requantize_(model, "fp8", source="stored")
    assert permitted(model) == ["0", "1", "2"] and any("may round x" in note for note in report.notes)
    report = requantize_(model, "fp8", source="stored", activations="")
    assert not permitted(model) and any("is dropped" in note for note in report.notes)
    requantize_(model, "fp8", source="stored", activations="fp8")
    assert permitted(model) == ["0", "1", "2"]


@pytest.mark.parametrize(("asked", "stays"), [(None, True), ("fp8", True), ("", False)])
def test_auto_keeps_it_too(asked: str | None, stays: bool) -> None:
    model = model_in_fp8()
    options = {"target_bpw": 8.4, "formats": ["q2k", "fp8"], "source": "stored"}
    requantize_(model, "auto", activations=asked, **options)
    in_fp8 = [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear) and layer.format == "fp8"]
    assert in_fp8 and permitted(model) == (in_fp8 if stays else [])


def test_a_failure_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in_fp8()

    def fail(*arguments: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("listener")

    monkeypatch.setattr(sys.modules["isqtorch.inplace.requantize"], "announce", fail)
    with pytest.raises(RuntimeError, match="listener"):
        requantize_(model, "fp8", source="stored", activations="")
    assert permitted(model) == ["0", "1", "2"]


# ---- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_file_has_it_layer_by_layer(tmp_path: Path) -> None:
    model = model_in_fp8()
    model[1].activations = None
    checkpoint.save(model, tmp_path / "x.safetensors")
    other = mlp()
    checkpoint.load_(other, tmp_path / "x.safetensors")
    assert permitted(other) == ["0", "2"] and repr(other) == repr(model)
    again = model_in_fp8()  # the file decides, not the layers that it replaces
    checkpoint.load_(again, tmp_path / "x.safetensors")
    assert permitted(again) == ["0", "2"]


@pytest.mark.parametrize(
    "change",
    [{"activations": "int8"}, {"activations": ["fp8"]}, {"format": "q8_0"}, {"kind": "embedding"}],
    ids=["unknown", "a list", "another format", "a table"],
)
def test_a_file_that_lies_about_it_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(model_in_fp8(), path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["isqtorch"])
    header["layers"]["0"] |= change
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, {"isqtorch": json.dumps(header)})
    with pytest.raises(ValueError, match="layer '0': activations are"):
        checkpoint.load_(mlp(), path)


# ---- explain, doctor, the command line --------------------------------------------------------------------------------


def test_explain_says_that_the_cpu_does_not_round() -> None:
    found = explain(model_in_fp8())
    assert 'activations="fp8" changes nothing for 3 layers: there is no FP8 product on cpu' in found.notes


def test_explain_names_the_product_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["isqtorch.explain"]
    built = native.CudaInfo(
        "13.0", ("90a",), {"fp8": {"block": 128, "block_bytes": 132, "few_rows": 8, "max_rows": 512, "w8a8_rows": 128}}
    )
    monkeypatch.setattr(module, "NATIVE_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(module, "cuda_info", lambda: built)
    monkeypatch.setattr(module, "no_fp8_products", lambda device: None)
    uses = module._kernels("linear", "fp8", "cuda", native.cpu_info(), True)
    assert [use.rows for use in uses] == ["1-8", "9-128", "129+"] and "_scaled_mm" in uses[2].kernel
    assert "_scaled_mm" not in module._kernels("linear", "fp8", "cuda", native.cpu_info())[2].kernel
    layers = [QuantLinear(256, n, format="fp8") for n in (48, 40)] + [QuantLinear(128, 48, format="fp8")]
    for layer in layers:
        layer.activations = "fp8"
    assert [module._has_fp8_products(layer) for layer in layers] == [True, False, False]
    (note,) = module._activation_notes(layers)
    assert "2 layers: cuBLAS wants out_features that are a multiple of 16" in note
    layers[0].activations = None
    assert not module._has_fp8_products(layers[0])


@pytest.mark.parametrize(
    ("cuda", "capability", "why"),
    [
        ("13.0", (9, 0), None),
        ("12.9", (9, 0), None),
        ("12.8", (9, 0), "torch is for CUDA 12.8"),
        ("13.0", (10, 0), "compute capability 10.0"),
        ("13.0", (8, 9), "compute capability 8.9"),
    ],
)
def test_which_gpus_have_such_products(
    monkeypatch: pytest.MonkeyPatch, cuda: str, capability: tuple[int, int], why: str | None
) -> None:
    monkeypatch.setattr(native, "CUDA_LIBRARY", Path("there"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    said = native.no_fp8_products("cuda:0")
    assert said is None if why is None else why in str(said)
    monkeypatch.setattr(native, "CUDA_LIBRARY", None)
    assert "no CUDA kernels" in str(native.no_fp8_products("cuda"))


def test_the_command_line_passes_it_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert main(["quantize", "-m", DEMO, "--isq", "fp8", "--activations", "fp8", "-o", str(out)]) == 0
    assert "may round x to FP8" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["activations"] == "fp8"
    assert main(["plan", "-m", DEMO, "--isq", "fp8", "--activations", "fp8"]) == 0
    assert "may round x to FP8" in capsys.readouterr().out
    assert main(["plan", "-m", DEMO, "--isq", "q4k", "--activations", "fp8"]) != 0
    assert "none will be" in capsys.readouterr().err
    assert main(["plan", "-m", DEMO, "--activations", "fp8"]) != 0
    assert "needs --isq" in capsys.readouterr().err


def test_doctor_says_whether_there_are_such_products(capsys: pytest.CaptureFixture[str]) -> None:
    from isqtorch.cli.doctor import fp8_activations

    assert fp8_activations().startswith(("cpu: no, there is no FP8 product on cpu", "cuda:0: "))


# ---- transformers -----------------------------------------------------------------------------------------------------


def test_a_server_drops_it_with_fp8_and_takes_it_up_again() -> None:
    pytest.importorskip("transformers")
    from isqtorch.app.model import LoadedModel

    loaded = LoadedModel(DEMO, "fp8", options={"activations": "fp8"})
    every = permitted(loaded.model)
    assert every
    assert any("is dropped" in note for note in loaded.requantize("q8_0").notes) and not permitted(loaded.model)
    loaded.requantize("fp8")
    assert permitted(loaded.model) == every


def test_isq_config_keeps_it_through_save_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = isqtorch.IsqConfig("fp8", activations="fp8", topology={"0": "q8_0"})
    model = load(DEMO, quantization_config=config)
    every = permitted(model)
    assert every and any("may round x" in note for note in model.isq_report.notes)
    model.save_pretrained(tmp_path / "all")
    assert permitted(load(tmp_path / "all")) == every

    model.get_submodule(every[1]).activations = None  # then config.json lists those that have it
    model.save_pretrained(tmp_path / "some")
    stored = json.loads((tmp_path / "some/config.json").read_text())["quantization_config"]["activations"]
    assert stored == [every[0], *every[2:]]
    again = load(tmp_path / "some")
    assert permitted(again) == stored
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "some/config.json").read_text()

    requantize_(again, "q8_0", source="stored")
    again.save_pretrained(tmp_path / "none")
    assert "activations" not in json.loads((tmp_path / "none/config.json").read_text())["quantization_config"]


def test_auto_while_loading_decides_first_who_is_fp8() -> None:
    transformers = pytest.importorskip("transformers")
    config = isqtorch.IsqConfig("auto", target_bpw=6.5, formats=["q2k", "fp8"], activations="fp8")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=config)
    linear = [layer.name for layer in model.isq_report.layers if layer.stored == "fp8" and layer.kind == "linear"]
    assert permitted(model) == linear != []
    assert "q2k" in {layer.stored for layer in model.isq_report.layers}


def test_a_model_that_was_quantized_after_loading_saves_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import isqtorch.integrations.transformers  # noqa: F401  (listens)

    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(DEMO)
    quantize_(model, "fp8", activations="fp8")
    model.save_pretrained(tmp_path / "x")
    assert permitted(load(tmp_path / "x")) == permitted(model) != []
    requantize_(model, "fp8", activations="")
    model.save_pretrained(tmp_path / "y")
    assert permitted(load(tmp_path / "y")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isq": "fp8", "activations": "int8"}, 'IsqConfig: activations must be None or "fp8"'),
        ({"isq": "fp8", "activations": ["a"]}, 'IsqConfig: activations must be None or "fp8"'),
        ({"layers": {"a": "fp8"}, "activations": "int8"}, 'must be "fp8" or a list of layers'),
        ({"layers": {"a": "fp8"}, "activations": 3}, 'must be "fp8" or a list of layers'),
        ({"layers": {"a": "fp8", "b": "q4k"}, "activations": ["a", "b"]}, "names 'b', which is no layer in fp8"),
    ],
)
def test_isq_config_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        isqtorch.IsqConfig(**options)
