"""The report of quantize_, for people and for programs."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from models import ConvNet, tiny_llama

from isqtorch.inplace.quantize import quantize_


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
