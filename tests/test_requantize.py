"""requantize_: from the source again, with what was asked for last; and sources that do not fit."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from models import EXPERTS, HIDDEN, FusedMoE, everything, mlp, quantized, state_bytes, stored
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isqtorch import checkpoint, dequantize_, quantize_, requantize_
from isqtorch.files import tensors
from isqtorch.inplace import requantize, source
from isqtorch.report.report import QuantReport

# ---- from the source -------------------------------------------------------------------------------------------------


def test_from_two_bits_it_is_the_model_quantized_afresh(tmp_path: Path) -> None:
    file = stored(mlp(), tmp_path)
    model = quantized(mlp(), "q2k")
    report = requantize_(model, "q8_0", source=file, measure_error=True)
    assert state_bytes(model) == state_bytes(quantized(mlp(), "q8_0"))
    assert report["0"].dtype == "q2k" and report["0"].stored == "q8_0" and report["0"].error < 0.01
    assert f"made from the weights in {tmp_path}" in report.notes and report.seconds > 0
    assert requantize_(model, "q3k")["1"].stored == "q3k"  # the source is remembered
    assert state_bytes(model) == state_bytes(quantized(mlp(), "q3k"))
    dequantize_(model)
    quantize_(model, "q8_0")
    with pytest.raises(ValueError, match="not known where"):  # these weights are not those of the file
        requantize_(model, "q3k")


def test_importance_on_the_same_format(tmp_path: Path) -> None:
    file = stored(mlp(), tmp_path)
    model, im = quantized(mlp(), "q4k"), {"0": torch.rand(256) + 0.01}
    before = state_bytes(model)
    report = requantize_(model, "q4k", source=tmp_path, imatrix=im)
    assert state_bytes(model) == state_bytes(quantized(mlp(), "q4k", imatrix=im)) != before
    assert report["0"].reason == "made anew"
    requantize_(model, "q4k", source=str(file))
    assert state_bytes(model) == before


@pytest.mark.parametrize("weighted", [True, False], ids=["importance", "weights"])
def test_auto_chooses_as_quantize_does(tmp_path: Path, weighted: bool) -> None:
    stored(FusedMoE(), tmp_path)
    model, fresh = quantized(FusedMoE(), "q2k", exclude="^proj$"), FusedMoE()
    options = {"target_bpw": 6.0, "formats": ["q4_0", "q5_1", "q8_0"]}
    options["imatrix"] = {"experts.gate_up_proj": torch.rand(EXPERTS, HIDDEN) + 0.01} if weighted else None
    report = requantize_(model, "auto", source=tmp_path, exclude=(), **options)
    want = quantize_(fresh, "auto", **options)
    assert state_bytes(model) == state_bytes(fresh)
    assert report.choice == want.choice and report.choice.measure == ("output" if weighted else "weight")
    assert len({layer.stored for layer in report.quantized}) > 1 and report.bits_per_weight <= 6
    assert (
        requantize_(model, "auto", max_size=report.bytes_after).bytes_after == report.bytes_after
    )  # the source is known


def test_auto_from_stored_weights_and_what_it_refuses(tmp_path: Path) -> None:
    model = quantized(mlp(), "q8_0")
    before = everything(model)
    for options, message in (
        ({"target_bpw": 5, "probe": "kl"}, "probe='kl' needs the gradients of float weights"),
        ({"target_bpw": 1}, "1 bits per weight cannot be reached"),
        ({}, "'auto' needs one of target_bpw"),
    ):
        with pytest.raises(ValueError, match=f"requantize_: {message}"):
            requantize_(model, "auto", source="stored", **options)
    tensors = load_file(stored(mlp(), tmp_path))
    poison(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"requantize_: 2: .*finite.* Nothing was changed"):
        requantize_(model, "auto", source=tmp_path, target_bpw=5)
    assert everything(model) == before
    report = requantize_(model, "auto", source="stored", target_bpw=5)
    assert 4 < report.bits_per_weight <= 5 and any("auto: " in note for note in report.notes)


def test_experts_and_what_was_left_in_float(tmp_path: Path) -> None:
    stored(FusedMoE(), tmp_path)
    model = quantized(FusedMoE(), "q4_0", include="experts")
    old = model.experts
    requantize_(model, "q8_0", source=tmp_path, topology={"/down_proj/": "q5_0"}, include="")
    assert model.experts is not old and old.formats == {"gate_up_proj": "q4_0", "down_proj": "q4_0"}
    assert model.experts.formats == {"gate_up_proj": "q8_0", "down_proj": "q5_0"}
    assert state_bytes(model) == state_bytes(quantized(FusedMoE(), "q8_0", topology={"/down_proj/": "q5_0"}))
    assert model(torch.randn(3, HIDDEN)).isfinite().all()


def test_the_first_request_holds_until_another_one_says_otherwise(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q4k", topology={"/^1$/": "q6k"}, exclude="2", fallback="skip")
    formats: Callable[[QuantReport], list[str | None]] = lambda report: [layer.stored for layer in report.layers]  # noqa: E731
    assert formats(requantize_(model, "q3k", source=tmp_path)) == ["q3k", "q6k", None]
    assert formats(requantize_(model, "q2k", exclude=())) == ["q2k", "q6k", "q2k"]
    assert formats(requantize_(model, "q5k", topology={}, include="0")) == ["q5k", "q6k", "q2k"]
    assert formats(requantize_(model, "q8_0")) == ["q8_0", "q6k", "q2k"]  # include, now
    assert formats(requantize_(model, "q8_0", include="")) == ["q8_0"] * 3
    with pytest.raises(ValueError, match=r"entry '0' names a device, and requantize_ moves no layer"):
        requantize_(model, "q8_0", topology={0: {"device": "cpu"}})


@pytest.mark.parametrize(
    ("option", "before", "empty"),
    [
        *[("include", "^1$", empty) for empty in ((), [], "")],
        *[("exclude", ["^0$", "2"], empty) for empty in ((), [], "")],
        *[("topology", {"/^[02]$/": None}, empty) for empty in ({}, "")],
    ],
)
def test_an_empty_value_drops_a_remembered_option(tmp_path: Path, option: str, before: Any, empty: Any) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q4k", **{option: before})
    assert [layer.stored for layer in requantize_(model, "q3k", source=tmp_path).layers] == [None, "q3k", None]
    report = requantize_(model, "q5k", **{option: empty})
    assert [layer.stored for layer in report.layers] == ["q5k"] * 3
    assert [layer.stored for layer in requantize_(model, "q4k").layers] == ["q4k"] * 3  # it stays dropped


@pytest.mark.parametrize("option", ["organization", "fallback"])
def test_an_option_that_is_never_none_cannot_be_empty(tmp_path: Path, option: str) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q4k")
    before = everything(model)
    with pytest.raises(ValueError, match=f"requantize_: {option} must be one of .*; got ''"):
        requantize_(model, "q5k", **{option: ""})
    assert everything(model) == before


def test_ties_and_shared_modules(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(64, 256), nn.Linear(256, 64, bias=False)
            self.head.weight = self.embed.weight
            self.once = self.twice = nn.Linear(256, 256)

    tensors = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    for name in ("embed.weight", "twice.weight", "twice.bias"):
        del tensors[name]  # a file has a shared tensor once, under whichever name
    save_file(tensors, tmp_path / "model.safetensors")
    model = quantized(Tied(), "q4k")
    requantize_(model, "q8_0", source=tmp_path)
    assert model.head.weight is model.embed.weight and model.once is model.twice
    assert state_bytes(model) == state_bytes(quantized(Tied(), "q8_0"))


def test_stored_weights_only_if_asked_for(tmp_path: Path) -> None:
    model = quantized(mlp(), "q8_0")
    with pytest.raises(
        ValueError, match=r"not known where the model's weights came from. Give source=.* or source='stored'"
    ):
        requantize_(model, "q4k")
    decoded = model[0].dequantize()
    report = requantize_(model, "q4_0", source="stored")
    assert same_bits(model[0].weight, torch.ops.isqtorch.quantize(decoded, "q4_0"))
    assert any("their errors stay" in note for note in report.notes)
    with pytest.raises(ValueError, match="not known"):
        requantize_(model, "q4k")


def test_a_model_from_a_file_says_that_its_request_is_not_known(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    checkpoint.save(quantized(mlp(), "q8_0"), tmp_path / "packed.safetensors")
    model = mlp()
    checkpoint.load_(model, tmp_path / "packed.safetensors")
    report = requantize_(model, "q4k", source=tmp_path / "model.safetensors")
    assert any("only those of this call" in note for note in report.notes)
    with pytest.raises(ValueError, match="is quantized by isqtorch itself"):
        requantize_(model, "q4k", source=tmp_path / "packed.safetensors")


def test_the_source_goes_where_the_model_goes(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q2k")
    requantize_(model, "q4k", source=tmp_path)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        requantize_(again, "q8_0")
        assert again[0].format == "q8_0" and model[0].format == "q4k"
    checkpoint.save(model, tmp_path / "packed.safetensors")
    checkpoint.load_(model, tmp_path / "packed.safetensors")  # it could have been any file
    with pytest.raises(ValueError, match="not known where"):
        requantize_(model, "q8_0")


# ---- a source that does not fit --------------------------------------------------------------------------------------


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["1.weight"]


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["1.weight"] = tensors["1.weight"][:128].clone()


def pack(tensors: dict[str, Tensor]) -> None:
    tensors["1.weight"] = tensors["1.weight"].to(torch.int8)


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["2.weight"][255, 7] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"has no 1\.weight\. Give source=.* source='stored'.* or exclude the layer"),
        (reshape, r"1\.weight is \[128, 256\] in .*, \[256, 256\] in the model\. Give source"),
        (pack, r"1\.weight is I8, must be one of F64, F32, F16, BF16\. Give source"),
        (poison, r"requantize_: 2: .*finite.* Nothing was changed"),
    ],
)
def test_what_is_wrong_with_a_source(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = load_file(stored(mlp(), tmp_path))
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = quantized(mlp(), "q4k")
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        requantize_(model, "q8_0", source=tmp_path)
    assert everything(model) == before


def test_a_model_that_was_trained_since(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q4k")
    requantize_(model, "q8_0", source=tmp_path)
    with torch.no_grad():
        model[1].bias[17] += 1e-6
    before = everything(model)
    with pytest.raises(
        ValueError, match=r"1\.bias \(by up to 9\.\d+e-07\) is not what .* has: the model was changed since"
    ):
        requantize_(model, "q4k")
    assert everything(model) == before
    (tmp_path / "other").mkdir()
    stored(mlp(), tmp_path / "other")
    with pytest.warns(UserWarning, match=r"1\.bias \(by up to .*\) is not what .* stay as they are"):
        requantize_(model, "q4k", source=tmp_path / "other")
    assert model[1].format == "q4k"


class Whole(nn.Module):
    """A model of which a norm, a buffer, a table and a conv stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(256, 256, bias=False)
        self.norm = nn.BatchNorm1d(256)
        self.table = nn.Embedding(400, 256)  # larger than what is compared whole
        self.stack = nn.Parameter(torch.randn(3, 200, 200))
        self.gain = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize(
    ("name", "place"),
    [("norm.weight", 7), ("norm.running_var", 255), ("table.weight", 399), ("stack", 119999), ("gain", 0)],
)
def test_what_stayed_whole_is_compared(tmp_path: Path, name: str, place: int) -> None:
    model = Whole().eval()
    stored(model, tmp_path)
    quantized(model, "q8_0", exclude="table")
    requantize_(model, "q8_0", source=tmp_path)
    with torch.no_grad():
        model.state_dict()[name].reshape(-1)[-1 if name == "table.weight" else place] += 0.5
    with pytest.raises(ValueError, match=rf"{re.escape(name)} \(by up to 0\.5\) is not what"):
        requantize_(model, "q8_0")


@pytest.mark.parametrize(("mapped", "times"), [(1 << 24, 1), (1, 12)], ids=["small", "large"])
def test_files_are_opened_once_until_many_bytes_may_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: int, times: int
) -> None:
    model = nn.Sequential(*(nn.Linear(256, 300, bias=False) for _ in range(12)))
    opened: list[Path] = []
    checkpoint = source.TensorFiles([stored(model, tmp_path)])
    monkeypatch.setattr(source, "_MAPPED", mapped)
    monkeypatch.setattr(tensors, "safe_open", lambda path, framework: opened.append(path) or safe_open(path, framework))
    assert source.difference(model, checkpoint) is None
    assert len(opened) == times
    with torch.no_grad():
        model[11].weight[299, 255] += 0.5
    assert source.difference(model, checkpoint) == "11.weight (by up to 0.5)"


def test_the_checkpoint_of_another_model_is_noticed_when_all_is_packed(tmp_path: Path) -> None:
    def bare(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(256, 300, bias=False), nn.Embedding(20, 256))

    for fmt in ("q2k", "afq2", "hqq4", "fp8"):
        model = quantized(bare(1), fmt)
        for seed, noticed in ((1, False), (2, True)):
            folder = tmp_path / f"{fmt}{seed}"
            folder.mkdir()
            stored(bare(seed), folder)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                requantize_(copy.deepcopy(model), "q8_0", source=folder)
            found = [str(warning.message) for warning in caught if "is not what" in str(warning.message)]
            assert bool(found) == noticed and all("correlation of" in text for text in found)


def test_a_left_index_is_not_read(tmp_path: Path) -> None:
    model = mlp()
    stored(model, tmp_path)
    other = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(other, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    want = state_bytes(quantized(copy.deepcopy(model), "q8_0"))
    quantized(model, "q4k")
    requantize_(model, "q8_0", source=tmp_path)
    assert state_bytes(model) == want


def test_layers_without_values_here(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q4k")
    model[1].to("meta")
    with pytest.raises(
        ValueError, match="1 is on the meta device: it is offloaded or spread over processes. Exclude it"
    ):
        requantize_(model, "q8_0", source=tmp_path)
    assert requantize_(model, "q8_0", source=tmp_path, exclude="1")["1"].stored == "q4k"


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10" + b"\0" * 7 + b'{"a":1}' + b" " * 9])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    model = quantized(mlp(), "q4k")
    before = everything(model)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        requantize_(model, "q8_0", source=tmp_path)
    (tmp_path / "model.safetensors").unlink()  # else it would be taken, as transformers does
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"0.weight": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="is not a plain file name"):
        requantize_(model, "q8_0", source=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        requantize_(model, "q8_0", source=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors"):
        requantize_(model, "q8_0", source=tmp_path / "empty")
    assert everything(model) == before


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(mlp(), tmp_path)
    model, original = quantized(mlp(), "q2k"), requantize.pack_weight
    before = everything(model)

    def meddling(*args: Any) -> Any:
        stored(mlp(), tmp_path, "other")
        (tmp_path / "other").replace(tmp_path / "model.safetensors")
        return original(*args)

    monkeypatch.setattr(requantize, "pack_weight", meddling)
    with pytest.raises(ValueError, match=r"model\.safetensors: was replaced or written to while it was read"):
        requantize_(model, "q8_0", source=tmp_path)
    assert everything(model) == before
