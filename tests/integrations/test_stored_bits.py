"""A number of bits keeps what is stored in so many bits: the best format of that size is the one that the weights have.

A name of a format, a mix and a topology pack anew, and the report says what that adds to the error.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import test_stored_fp8
import test_stored_integers
import torch
from models import state_bytes
from quantized_folders import packed, rewrite
from transformers import AutoModelForCausalLM

import isqtorch
from isqtorch.cli import main

FOLDERS: dict[str, Any] = {
    "mxfp4": (test_stored_fp8.folders, 4, "mxfp4"),
    "block": (test_stored_fp8.folders, 8, "fp8"),
    "qwen3_moe": (test_stored_fp8.folders, 8, "fp8"),
    "gptq_g64": (test_stored_integers.folders, 4, "hqq4"),
}
Case = tuple[Path, Path, int, str]


@pytest.fixture(scope="module", params=list(FOLDERS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """(quantized folder, the same in floats, its bits, the format that holds it)."""
    make, bits, fmt = FOLDERS[request.param]
    return (*make(tmp_path_factory.mktemp(request.param), request.param), bits, fmt)


def kept(report: isqtorch.QuantReport) -> dict[str, str | None]:
    return {layer.name: layer.stored for layer in report.layers if "kept: stored as" in layer.reason}


def bytes_of(model: Any, names: Any) -> dict[str, Any]:
    """The packed bytes of some layers."""
    state = model.state_dict()
    return {name: state[name if name in state else f"{name}.weight"].numpy().tobytes() for name in names}


def test_a_number_of_bits_keeps_the_blocks(case: Case) -> None:
    quantized, _, bits, fmt = case
    model, as_it_is = packed(quantized, bits), packed(quantized, "keep")
    found = kept(model.isq_report)
    assert found and {name.partition("g")[0] for name in found.values() if name} == {fmt.partition("g")[0]}
    assert bytes_of(model, found) == bytes_of(as_it_is, found)
    assert model.isq_report["lm_head"].stored not in (None, fmt)  # what was float is packed as usual
    assert any(f"{len(found)} weights are taken over" in note for note in model.isq_report.notes)


def test_every_way_in_gives_the_same(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized, _, bits, _ = case
    model = packed(quantized, bits)
    assert state_bytes(isqtorch.load(quantized, bits, progress=False).model) == state_bytes(model)
    planned = isqtorch.plan(quantized, str(bits))
    assert {layer.name: layer.stored for layer in planned.layers} == {
        layer.name: layer.stored for layer in model.isq_report.layers
    }
    assert kept(planned) == kept(model.isq_report) and planned.bytes_after == model.isq_report.bytes_after
    assert main(["quantize", "-m", str(quantized), "--isq", str(bits), "-o", str(tmp_path / "out")]) == 0
    assert "kept: stored as" in capsys.readouterr().out
    assert state_bytes(isqtorch.load(tmp_path / "out").model) == state_bytes(model)


def test_requantize_goes_back_to_the_blocks(case: Case) -> None:
    quantized, _, bits, _ = case
    model = packed(quantized, "q2k")
    report = isqtorch.requantize_(model, bits, progress=False)
    assert kept(report)
    assert state_bytes(model) == state_bytes(packed(quantized, bits))


def test_a_name_packs_anew_and_says_what_that_adds(case: Case) -> None:
    quantized, floats, bits, _ = case
    name = {4: "q4_0", 8: "q8_0"}[bits]
    model = packed(quantized, name)
    stored = packed(quantized, "keep").isq_report
    anew = [layer for layer in model.isq_report.layers if stored[layer.name].stored is not None]
    assert not kept(model.isq_report) and anew
    bounds = {4: (0.01, 0.2), 8: (0.0005, 0.02)}[bits]
    exact = AutoModelForCausalLM.from_pretrained(floats, dtype="auto")
    measured = isqtorch.quantize_(exact, name, measure_error=True, progress=False)
    for layer in anew:
        assert layer.error is not None and bounds[0] < layer.error < bounds[1]
        assert layer.error == pytest.approx(measured[layer.name].error, rel=0.2)  # of some rows
    assert any("packed anew, which adds an error of up to" in note for note in model.isq_report.notes)


def test_a_topology_packs_anew(case: Case) -> None:
    quantized, _, bits, _ = case
    name = next(iter(kept(packed(quantized, bits).isq_report)))
    report = packed(quantized, bits, topology={f"/^{name}$/": bits}).isq_report
    assert name not in kept(report) and "packed anew" in report[name].reason
    assert kept(report)


@pytest.mark.parametrize("other", [2, 6])
def test_another_number_packs_anew(case: Case, other: int) -> None:
    assert not kept(packed(case[0], other).isq_report)


def test_excluded_layers_stay_float(case: Case) -> None:
    quantized, _, bits, _ = case
    report = packed(quantized, bits, exclude=r"layers\.0\.").isq_report
    assert kept(report) and not any(".layers.0." in name for name in kept(report))


@pytest.mark.parametrize("isq", ["keep", "its bits", "q5_0"])
def test_names_that_are_mapped(case: Case, isq: str, tmp_path: Path) -> None:
    quantized, _, bits, _ = case
    shutil.copytree(quantized, tmp_path / "renamed")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.layers.", "model.blocks.")] = tensors.pop(name)

    rewrite(tmp_path / "renamed", rename)
    config = isqtorch.IsqConfig(bits if isq == "its bits" else isq)
    mapping = {r"^model\.blocks\.": "model.layers."}
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "renamed", quantization_config=config, key_mapping=mapping, output_loading_info=True
    )
    assert not any(info.values())
    wanted = packed(quantized, config.isq)
    assert state_bytes(model) == state_bytes(wanted) and kept(model.isq_report) == kept(wanted.isq_report)
    isqtorch.requantize_(model, "q8_0", progress=False)
    isqtorch.requantize_(wanted, "q8_0", progress=False)
    assert state_bytes(model) == state_bytes(wanted)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_transformers_has_decoded(tmp_path: Path) -> None:
    quantized, _ = test_stored_fp8.folders(tmp_path, "mxfp4")
    wanted = packed(quantized, 4)
    model = AutoModelForCausalLM.from_pretrained(quantized, dtype="auto")  # bf16, where there is no Triton
    report = isqtorch.quantize_(model, 4, progress=False)
    assert kept(report) == kept(wanted.isq_report) and state_bytes(model) == state_bytes(wanted)
    named = AutoModelForCausalLM.from_pretrained(quantized, dtype="auto")
    assert not kept(isqtorch.quantize_(named, "q4_0", progress=False))
    isqtorch.requantize_(named, 4, progress=False)
    assert state_bytes(named) == state_bytes(wanted)


@pytest.mark.filterwarnings("ignore")
def test_a_decoded_model_that_has_changed_is_packed_from_its_floats(tmp_path: Path) -> None:
    quantized, _ = test_stored_fp8.folders(tmp_path, "mxfp4")
    model = AutoModelForCausalLM.from_pretrained(quantized, dtype="auto")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[3, 95, 127] += 1
    report = isqtorch.quantize_(model, 4, progress=False)
    assert report["model.layers.0.mlp.experts.down_proj"].stored == "iq4_nl"  # as usual, for 96 columns
    assert set(kept(report)) == {
        f"model.layers.{name}"
        for name in ("0.mlp.experts.gate_up_proj", "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj")
    }


def test_a_gguf_file_of_four_bits_stays_as_it_is(tmp_path: Path) -> None:
    from gguf_models import tiny_model, write_model

    write_model(tmp_path / "model.gguf", tiny_model("llama"), lambda name: "q4_0")
    as_it_is, asked = isqtorch.load(tmp_path / "model.gguf"), isqtorch.load(tmp_path / "model.gguf", 4)
    assert kept(asked.report) and set(kept(asked.report).values()) == {"q4_0"}
    assert bytes_of(asked.model, kept(asked.report)) == bytes_of(as_it_is.model, kept(asked.report))
    isqtorch.requantize_(asked.model, "q8_0", progress=False)
    assert kept(isqtorch.requantize_(asked.model, 4, progress=False)) == kept(asked.report)
    assert not kept(isqtorch.load(tmp_path / "model.gguf", "q5_0").report)
