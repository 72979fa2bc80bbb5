"""A number of bits: the format that it means for a layer, and how much more the embeddings of a model may take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import isqtorch
from isqtorch.formats import SLACK, get_format, resolve_format
from isqtorch.policy.decide import Decision, decide
from isqtorch.policy.layers import LayerInfo
from isqtorch.policy.numbers import MOST_ADDED
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request

ODD = [576, 640, 896]  # columns of small models: no multiple of 256


def linear(name: str, rows: int = 64, columns: int = 576, dtype: torch.dtype = torch.bfloat16, **more) -> LayerInfo:
    return LayerInfo(name, "linear", (rows, columns), dtype, **more)


def decided(layers: list[LayerInfo], fmt: int | str, **options) -> list[Decision]:
    return decide(layers, Request(fmt, Options(**options))).decisions


def stored(decision: Decision) -> str | None:
    return None if decision.format is None else decision.format.name


@pytest.mark.parametrize("columns", ODD)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_number_is_met_where_no_k_quant_fits(bits: int, columns: int, device: str) -> None:
    fmt = resolve_format(bits, device, columns)
    assert columns % fmt.block == 0 and bits <= fmt.bits_per_weight <= bits + SLACK
    assert fmt.bits == bits


@pytest.mark.parametrize("columns", [None, 256, 4096])
def test_usual_widths_keep_their_formats(columns: int | None) -> None:
    names = {bits: resolve_format(bits, columns=columns).name for bits in (2, 3, 4, 5, 6, 8)}
    assert names == {2: "q2k", 3: "q3k", 4: "q4k", 5: "q5k", 6: "q6k", 8: "q8_0"}


@pytest.mark.parametrize("columns", ODD)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, "4"])
def test_report_and_plan_agree_on_the_size(bits: int | str, columns: int) -> None:
    model = nn.Sequential(nn.Embedding(512, columns), nn.Linear(columns, 64), nn.Linear(64, 2048))
    planned = isqtorch.plan(model, bits)
    report = isqtorch.quantize_(model, bits, progress=False)
    assert report.bytes_after == planned.bytes_after
    assert [layer.stored for layer in report.layers] == [layer.stored for layer in planned.layers]
    layer = report["1"]
    assert layer.bits_per_weight <= int(bits) + SLACK and not layer.fell_back
    assert bits == 8 or "columns are not a multiple of 256" in layer.reason


def test_a_name_keeps_the_chain_of_llama_cpp() -> None:
    (decision,) = decided([linear("up")], "q4k")
    assert stored(decision) == "q5_0" and decision.fell_back


def test_the_reason_tells_what_the_number_became() -> None:
    (decision,) = decided([linear("up")], 4)
    assert decision.reason == "576 columns are not a multiple of 256: iq4_nl for 4 bits"
    assert decision.requested == "iq4_nl" and decision.by_number
    assert decided([linear("up", columns=512)], 4)[0].reason == ""


def test_scales_have_the_type_of_the_weights() -> None:
    assert stored(decided([linear("up", dtype=torch.float16)], 3)[0]) == "afq3.f16"


@pytest.mark.parametrize("fallback", ["skip", "error"])
def test_a_number_that_is_met_is_no_fallback(fallback: str) -> None:
    assert stored(decided([linear("up")], 3, fallback=fallback)[0]) == "afq3"


def test_where_nothing_meets_the_number_it_is_a_fallback() -> None:
    layer = linear("up", columns=96)  # no multiple of 64
    (up,) = decided([layer], 2)
    assert stored(up) == "afq2g32" and up.fell_back
    assert up.reason == "96 columns are not a multiple of 256: afq2g32 for 2 bits; the smallest that fits"
    (skipped,) = decided([layer], 2, fallback="skip")
    assert stored(skipped) is None and skipped.reason.endswith("left as it is")
    with pytest.raises(ValueError, match=r"1 layers do not fit as asked: up: 96 columns"):
        decided([layer], 2, fallback="error")
    (none,) = decided([linear("up", columns=100)], 2)
    assert stored(none) is None and "no larger format fits" in none.reason


@pytest.mark.parametrize("entry", [4, "iq4_nl"])
def test_numbers_in_a_topology_mean_the_same(entry: int | str) -> None:
    (decision,) = decided([linear("layers.0.up")], 8, topology={0: entry})
    assert stored(decision) == "iq4_nl"


# ---- embeddings and output heads -------------------------------------------------------------------------------------


def with_table(share: float, columns: int = 512, role: str = "embedding") -> list[LayerInfo]:
    """A table with this part of 100,000 rows, and one other matrix with the rest."""
    rows = round(100_000 * share)
    return [
        LayerInfo("embed", "embedding", (rows, columns), torch.bfloat16, role=role),  # type: ignore[arg-type]
        linear("up", rows=100_000 - rows, columns=columns),
    ]


@pytest.mark.parametrize(
    ("bits", "share", "want"),
    [
        (4, 0.13, "q6k"),  # two tables of a model of 8 billion weights
        (4, 0.21, "q5k"),  # SmolLM2 135M
        (4, 0.63, "q4k"),  # Gemma 3 270M
        (2, 0.05, "q6k"),
        (2, 0.21, "q3k"),
        (6, 0.21, "q6k"),
        (6, 0.13, "q8_0"),
        (8, 0.01, "q8_0"),
    ],
)
def test_promotion_by_share(bits: int, share: float, want: str) -> None:
    table, _ = decided(with_table(share), bits)
    assert stored(table) == want
    assert table.promoted == (want != resolve_format(bits).name)
    assert ("promoted from" in table.reason) == table.promoted


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("columns", [512, 576])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.15, 0.21, 0.29, 0.4, 0.63, 0.9])
def test_the_model_stays_near_the_number(bits: int, columns: int, share: float) -> None:
    layers = with_table(share, columns)
    found = decided(layers, bits)
    size = sum(layer.packed_bytes(each.format) for layer, each in zip(layers, found, strict=True) if each.format)
    base = resolve_format(bits, columns=columns).bits_per_weight
    assert 8 * size / sum(layer.numel for layer in layers) <= base + MOST_ADDED + 1e-9


def test_a_tied_head_counts_once() -> None:
    embed, up = with_table(0.21)
    head = LayerInfo("lm_head", "linear", embed.shape, torch.bfloat16, role="head", tied_to="embed")
    assert [stored(each) for each in decided([embed, up, head], 4)] == ["q5k", "q4k", "q5k"]


def test_a_name_is_promoted_whatever_it_costs() -> None:
    assert stored(decided(with_table(0.63), "q4k")[0]) == "q6k"


def test_a_table_alone_is_promoted_in_full() -> None:
    """vLLM asks for one layer at a time: how large the model is, is not known then."""
    assert stored(decided(with_table(0.5)[:1], 4)[0]) == "q6k"


# ---- one tensor ------------------------------------------------------------------------------------------------------


def test_one_tensor_takes_a_number() -> None:
    packed = isqtorch.quantize(torch.randn(8, 576), 4)
    assert packed.format.name == "iq4_nl"


def test_the_chosen_format_of_four_bits_has_the_least_error_of_its_size() -> None:
    """On weights with the tails of real ones, which the ranges of affine formats have to span."""
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(5.0).sample((256, 576)) * 0.02
    errors = {
        name: float((isqtorch.quantize(weight, name).dequantize() - weight).norm() / weight.norm())
        for name in ("q4_0", "iq4_nl", "afq4", "hqq4", "mxfp4")
    }
    assert {get_format(name).bits for name in errors} == {4}
    assert min(errors, key=lambda name: errors[name]) == resolve_format(4, columns=576).name, errors
