"""Quantizing while loading gives, bit for bit, what quantize_ makes of the loaded model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FORMATS
from hf import MODELS, load, logits
from models import state_bytes, tiny_llama

import isqtorch
from isqtorch import IsqConfig

Folders = Callable[[str], Path]


def both(folder: Path, fmt: Any, **options: Any) -> tuple[Any, Any, isqtorch.QuantReport]:
    """(quantized while loading, loaded and then quantized, the latter's report)."""
    immediate = load(folder, quantization_config=IsqConfig(fmt, **options))
    deferred = load(folder)
    report = isqtorch.quantize_(deferred, fmt, **options)
    return immediate, deferred, report


def assert_same(immediate: Any, deferred: Any, report: isqtorch.QuantReport) -> None:
    assert state_bytes(immediate) == state_bytes(deferred)
    assert [str(module) for module in immediate.modules()] == [str(module) for module in deferred.modules()]
    assert immediate.isq_report.layers == report.layers
    assert immediate.isq_report.notes == report.notes
    assert immediate.isq_report.bytes_after == report.bytes_after


@pytest.mark.parametrize("fmt", ["q4k", 4, "afq4", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_immediate_equals_deferred(checkpoints: Folders, name: str, fmt: Any) -> None:
    immediate, deferred, report = both(checkpoints(name), fmt)
    assert_same(immediate, deferred, report)
    assert torch.equal(logits(immediate), logits(deferred))
    assert immediate.isq_report.quantized and immediate.isq_report.seconds > 0


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_format(llama: Path, fmt: isqtorch.QuantFormat) -> None:
    assert_same(*both(llama, fmt.name))


def test_a_format_object_is_taken(llama: Path) -> None:
    assert load(llama, quantization_config=IsqConfig(isqtorch.get_format("q5k"))).lm_head.format == "q8_0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cast_while_loading(llama: Path, dtype: torch.dtype) -> None:
    immediate = load(llama, dtype=dtype, quantization_config=IsqConfig("afq4"))
    deferred = load(llama, dtype=dtype)
    isqtorch.quantize_(deferred, "afq4")
    assert state_bytes(immediate) == state_bytes(deferred)
    assert immediate.lm_head.dtype == dtype


def test_topology_include_and_exclude(llama: Path) -> None:
    topology = {"0": "q6k", "/down_proj$/": "fp8", "/o_proj/": None}
    immediate, deferred, report = both(llama, "q4k", topology=topology, include="layers", exclude=["v_proj"])
    assert_same(immediate, deferred, report)
    assert immediate.model.layers[0].mlp.down_proj.format == "fp8"
    assert immediate.model.layers[0].mlp.up_proj.format == "q6k"
    for left in ("lm_head", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.o_proj"):
        assert type(immediate.get_submodule(left)) is torch.nn.Linear


def test_topology_alone(llama: Path) -> None:
    immediate, deferred, report = both(llama, None, topology={"1": 8})
    assert_same(immediate, deferred, report)
    assert len(immediate.isq_report.quantized) == 7


def test_modules_to_not_convert(llama: Path) -> None:
    config = IsqConfig("q4k", modules_to_not_convert=["lm_head", "layers.1.mlp", "self_attn.q_pro"])
    with pytest.warns(UserWarning, match="modules_to_not_convert entry 'self_attn.q_pro' matches no layer"):
        model = load(llama, quantization_config=config)
    left = {layer.name for layer in model.isq_report.left}
    assert left == {"lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up"))}
    assert model.isq_report.notes == ["modules_to_not_convert entry 'self_attn.q_pro' matches no layer"]


def test_importance(llama: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = {
        f"model.layers.{i}.mlp.{name}": torch.rand(columns, generator=generator) + 0.1
        for i in range(2)
        for name, columns in (("up_proj", 256), ("down_proj", 512))
    }
    immediate, deferred, report = both(llama, "q4k", imatrix=matrix)
    assert_same(immediate, deferred, report)
    plain = load(llama, quantization_config=IsqConfig("q4k"))
    for name, parameter in plain.named_parameters():
        if "_proj" in name:
            same = torch.equal(parameter, immediate.get_parameter(name))
            assert same == (name.removesuffix(".weight") not in matrix), name


def test_importance_of_a_tied_head(checkpoints: Folders) -> None:
    immediate, deferred, report = both(checkpoints("tied"), "q4k", imatrix={"lm_head": torch.rand(256) + 0.1})
    assert_same(immediate, deferred, report)
    assert immediate.lm_head.weight is immediate.model.embed_tokens.weight


def test_fallback(tmp_path: Path) -> None:
    from models import tiny_llama

    tiny_llama(hidden=192).save_pretrained(tmp_path)
    assert_same(*both(tmp_path, "q4k"))
    assert_same(*both(tmp_path, "q4k", fallback="skip"))
    with pytest.raises(ValueError, match=r"IsqConfig: \d+ layers do not fit as asked: .*192 columns .* fallback='up'"):
        load(tmp_path, quantization_config=IsqConfig("q4k", fallback="error"))


def test_the_config_can_be_used_again(llama: Path, checkpoints: Folders) -> None:
    config = IsqConfig("q4k", imatrix={"model.layers.0.mlp.up_proj": torch.ones(256)})
    before = dict(vars(config))
    first, second = load(llama, quantization_config=config), load(checkpoints("tied"), quantization_config=config)
    assert vars(config) == before
    assert first.config.quantization_config.layers.keys() == second.config.quantization_config.layers.keys()


def test_as_a_dict(llama: Path) -> None:
    model = load(llama, quantization_config={"quant_method": "isq", "isq": "q5k"})
    assert model.model.layers[0].mlp.up_proj.format == "q5k"


def test_flags_that_transformers_asks_for(llama: Path) -> None:
    quantizer = load(llama, quantization_config=IsqConfig("q4k")).hf_quantizer
    assert quantizer.is_serializable() and quantizer.is_trainable and quantizer.is_compileable


def test_a_new_head_stays_float(llama: Path) -> None:
    """Layers that the checkpoint lacks are initialized as transformers does, and reported."""
    from transformers import AutoModelForSequenceClassification as Auto

    model = Auto.from_pretrained(llama, num_labels=300, quantization_config=IsqConfig("q4k"))
    assert type(model.score) is torch.nn.Linear and 0.01 < float(model.score.weight.detach().float().std()) < 0.04
    assert model.isq_report["score"].reason.startswith("newly initialized, not quantized")
    assert model.isq_report["score"].stored is None and "score" not in model.config.quantization_config.layers


def test_a_head_of_another_size(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    Auto.from_pretrained(llama, num_labels=32).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Auto.from_pretrained(tmp_path, num_labels=5, quantization_config=IsqConfig("q4k"))
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    model = Auto.from_pretrained(tmp_path, quantization_config=IsqConfig("q4k"), **options)
    assert type(model.score) is torch.nn.Linear and model.score.weight.shape == (5, 256)
    assert model.isq_report["score"].stored is None and bool(model.score.weight.isfinite().all())


def test_ties_that_the_checkpoint_breaks(checkpoints: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((checkpoints("tied") / "config.json").read_bytes())
    state = load_file(checkpoints("tied") / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    immediate, deferred, _ = both(tmp_path, "q4k")
    assert state_bytes(immediate) == state_bytes(deferred)
    head = immediate.isq_report["lm_head"]
    assert head.tied_to is None and head.stored == "q6k" and head.bytes_after == immediate.lm_head.weight.nbytes
    assert head.reason == "the checkpoint has another weight than that of model.embed_tokens"


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    from models import tiny_llama

    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 7] = torch.nan
    model.save_pretrained(tmp_path)
    expected = r"^IsqConfig: model\.layers\.1\.mlp\.up_proj\.weight: weight\[3, 7\] is nan; q4k needs finite values"
    with pytest.raises(ValueError, match=expected):
        load(tmp_path, quantization_config=IsqConfig("q4k"))
    load(tmp_path, quantization_config=IsqConfig("q4k", exclude=r"1\.mlp\.up_proj"))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": {"model": "cpu", "lm_head": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": 500_000}},
    ],
    ids=["said", "found"],
)
def test_offloading_to_disk(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="IsqConfig: the device_map puts layers on the disk.*save_pretrained"):
        load(llama, offload_folder=tmp_path, quantization_config=IsqConfig("q4k"), **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "there is neither a format nor a topology"),
        (("q4z",), {}, "q4z"),
        ((4,), {"topolgy": {}}, "unknown option 'topolgy'. Did you mean 'topology'"),
        ((4,), {"topology": {"x": 4}}, "unknown key 'x'"),
        ((4,), {"topology": {"0": {"device": "cpu"}}}, "topology entry '0' names a device; .* device_map"),
        ((4,), {"organization": "x"}, "organization must be one of"),
        ((4,), {"fallback": "x"}, "fallback must be one of"),
        ((4,), {"exclude": "("}, "exclude pattern '\\(': bad regex: missing"),
        ((4,), {"imatrix": 4}, "imatrix must be"),
        ((4,), {"imatrix": {"a": [-1.0]}}, "must be finite and not negative"),
    ],
)
def test_bad_options(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IsqConfig(*arguments, **options)


def test_bad_requests_of_this_model(llama: Path) -> None:
    for options, message in (
        ({"imatrix": {"model.layers.0.mlp.up_proj": torch.ones(5)}}, "needs 256 importance values, entry .* has 5"),
        ({"imatrix": {"elsewhere": torch.ones(256)}}, "It was made for another model"),
        ({"organization": "moqe"}, "IsqConfig: organization='moqe' quantizes routed experts only"),
        ({"rule": "mlx"}, "IsqConfig: .*rule"),
    ):
        with pytest.raises(ValueError, match=message):
            load(llama, quantization_config=IsqConfig("q4k", **options))


def test_nothing_quantized_is_a_warning(llama: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(llama, quantization_config=IsqConfig("q4k", include="no_such_layer"))
    assert any("IsqConfig quantized nothing" in str(warning.message) for warning in caught)


def test_layers_of_small_weights_are_said_while_loading(tmp_path: Path) -> None:
    model = tiny_llama(layers=1, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-4)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="1 layer lost much more than usual: model.layers.0.mlp.up_proj"):
        loaded = type(model).from_pretrained(tmp_path, quantization_config=IsqConfig("q6k"))
    assert [layer.name for layer in loaded.isq_report.damaged] == ["model.layers.0.mlp.up_proj"]
