"""The report of quantize_, for people and for programs."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import ConvNet, tiny_llama
from torch import nn

import isqtorch
from isqtorch.inplace.quantize import quantize_
from isqtorch.report.layer import LayerReport
from isqtorch.report.report import QuantReport


def table_of(text: str) -> list[str]:
    """The lines of the table, which comes last."""
    return text.split("\n\n")[1].splitlines()


def test_details_have_a_line_for_every_layer() -> None:
    report = quantize_(tiny_llama(hidden=288), "q4k", measure_error=True)
    text = report.details()
    table = table_of(text)
    head = table[0]
    assert head.split() == ["layer", "shape", "asked", "stored", "bpw", "before", "after", "error", "reason"]
    assert len(table) == 2 + len(report.layers)
    column = head.index("stored")
    for line, layer in zip(table[2:], report.layers, strict=True):
        assert line.startswith(layer.name) and line[column:].startswith(layer.stored or layer.dtype)
        assert line.endswith(layer.reason)
    assert text.startswith(
        "16 of 16 weights quantized (2 promoted, 14 fell back to another format), 0 left as they are"
    )
    assert f"{report.bits_per_weight:.2f} bits per weight over the whole model" in text


def test_the_printed_report_begins_with_totals_and_with_what_is_not_as_asked() -> None:
    report = quantize_(tiny_llama(), "q4k", exclude=[r"layers\.1\.mlp\.up"])
    lines = str(report).splitlines()
    assert lines[:3] == report.summary()[:3]
    table = table_of(str(report))
    assert table[0].split() == ["layer", "count", "shape", "asked", "stored", "bpw", "before", "after", "reason"]
    names = [line.split()[0] for line in table[2:]]
    assert names[:3] == ["model.embed_tokens", "model.layers.1.mlp.up_proj", "lm_head"]
    assert "model.layers.[0-1].mlp.down_proj" in names and "model.layers.0.mlp.up_proj" in names
    folded = next(line.split() for line in table if "[0-1].mlp.down_proj" in line)
    assert folded[1] == "2" and sum(int(line.split()[1]) for line in table[2:]) == len(report.layers)


def test_equal_reasons_about_different_layers_share_a_row() -> None:
    layer = LayerReport(
        "h.0.a", "linear", "", (8, 64), "bf16", "q4k", "q5_0", "64 columns: 4.5 bits, as h.0.b", 1024, 352
    )
    report = QuantReport(
        [replace(layer, name=f"h.{i}.a", reason=layer.reason.replace("0.b", f"{i}.b")) for i in (0, 1, 2, 5)], 0, 0
    )
    (row,) = table_of(str(report))[2:]
    assert row.startswith("h.[0-2,5].a") and row.endswith("64 columns: 4.5 bits, as h.[0-2,5].b") and "4.10 kB" in row


def test_a_model_of_very_different_layers_still_fits_on_a_screen() -> None:
    layers = [LayerReport(f"part{i}", "linear", "", (8, 64), "bf16", "q4k", "q4k", "", 1024, 288) for i in range(300)]
    report = QuantReport(layers, 0, 0)
    assert len(str(report).splitlines()) <= 50
    assert str(report).splitlines()[-2].split() == ["...", "260", "more", "rows", "260"]
    assert str(report).endswith("print(report.details()) has every layer") and "part299" in report.details()


def test_thirty_blocks() -> None:
    blocks = nn.ModuleList(
        nn.Sequential(*(nn.Linear(64, 64 + 32 * i, bias=False) for i in range(7))) for _ in range(30)
    )
    report = quantize_(nn.Sequential(blocks), "q4k", progress=False)
    assert len(report.layers) == 210 and len(str(report).splitlines()) < 20


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


@pytest.mark.parametrize("call", ["quantize_", "requantize_", "IsqConfig"])
def test_a_device_without_kernels_is_said_at_once(
    call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Not only in the report: the model will be many times slower than it could be."""
    model = tiny_llama(layers=1)
    if call == "IsqConfig":
        model.save_pretrained(tmp_path)
    elif call == "requantize_":
        quantize_(model, "q8_0")
    monkeypatch.setattr("isqtorch.inplace.prepare.NATIVE_DEVICES", ("cuda",))
    recwarn.clear()
    if call == "IsqConfig":
        report = type(model).from_pretrained(tmp_path, quantization_config=isqtorch.IsqConfig("q4k")).isq_report
    elif call == "requantize_":
        report = isqtorch.requantize_(model, "q4k", source="stored")
    else:
        report = quantize_(model, "q4k")
    [message] = {str(warning.message) for warning in recwarn if "native kernels" in str(warning.message)}
    assert message.startswith("there are no native kernels for cpu") and "slow; `isqtorch doctor` says more" in message
    assert message in report.notes


def test_the_report_says_where_the_reference_runs() -> None:
    from isqtorch.inplace.prepare import _kernel_notes
    from isqtorch.policy.decide import decide
    from isqtorch.policy.inventory import Inventory
    from isqtorch.policy.layers import LayerInfo
    from isqtorch.policy.request import Request

    layers = [
        LayerInfo(f"{d}.up", "linear", (8, 256), torch.bfloat16, device_type=d) for d in ("cpu", "mps", "cuda", "xpu")
    ]
    notes = _kernel_notes(Inventory(layers, 0, 0), decide(layers, Request("q4k")))
    assert [note.split(" for ")[1].split(" ")[0] for note in notes] == ["cuda", "xpu"]
    assert _kernel_notes(Inventory(layers[:1], 0, 0), decide(layers[:1], Request("q4k"))) == []
