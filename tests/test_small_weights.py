"""Weights too small for the scales of their format: what is stored, who is told, and who is not."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ALL_FORMATS, FORMATS, every_variant, relative_error, same_bits
from models import FusedMoE, mlp, tiny_gpt2
from torch import Tensor, nn

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format
from isqtorch.inplace.damage import damage
from isqtorch.inplace.quantize import quantize_
from isqtorch.inplace.requantize import requantize_
from isqtorch.ops import reference
from isqtorch.quantizers import has_rule
from isqtorch.quantizers.hqq import hqq_solve
from isqtorch.report.report import QuantReport

HQQ = [fmt for fmt in ALL_FORMATS if fmt.solver == "hqq"]
every_hqq = pytest.mark.parametrize("fmt", HQQ, ids=lambda fmt: fmt.name)


def packed(model: nn.Module, fmt: str, **options: Any) -> tuple[QuantReport, list[str]]:
    """The report, and the warnings about damage."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = quantize_(model, fmt, progress=False, **options)
    return report, told(caught)


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(entry.message) for entry in caught if "much more than usual" in str(entry.message)]


def scaled(model: nn.Module, factors: dict[str, float]) -> nn.Module:
    with torch.no_grad():
        for name, factor in factors.items():
            model.get_parameter(name).mul_(factor)
    return model


def error_of(w: Tensor, fmt: QuantFormat, rule: str | None = None, impl: Any = ops) -> float:
    return relative_error(impl.dequantize(impl.quantize(w, fmt.name, None, rule), fmt.name, torch.float32), w)


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("std", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 1e-20, 1e-38])
def test_a_layer_is_near_its_weights_or_it_is_said(fmt: QuantFormat, std: float) -> None:
    model = nn.Sequential(nn.Linear(512, 32))
    nn.init.normal_(model[0].weight, std=std)
    before = model[0].weight.detach().clone()
    report, alarms = packed(model, fmt.name)
    error = relative_error(model[0].dequantize(), before)
    layer = report.layers[0]
    assert layer.damaged == bool(alarms) == bool(report.damaged)
    assert layer.damaged or error < 3 * fmt.weight_error
    if layer.damaged:
        assert layer.error == pytest.approx(error, rel=1e-3) and error > 2 * fmt.weight_error
        assert "damaged" in layer.reason and alarms[0] in report.notes and fmt.name in alarms[0]


def test_one_warning_for_all_layers_with_figures_and_a_way_out() -> None:
    model = scaled(mlp(256, 6), {f"{i}.weight": 1e-4 for i in (0, 2, 3, 5)})
    report, alarms = packed(model, "q6k")
    [alarm] = alarms
    assert alarm.startswith(
        "quantize_: 4 layers lost much more than usual: 0 (q6k) is damaged: error 100 %, usually 1.9 %"
    )
    assert "and 1 more" in alarm and "fp8" in alarm and "exclude" in alarm
    assert [layer.name for layer in report.damaged] == ["0", "2", "3", "5"]
    assert report["1"].error is None and not report["1"].damaged and not report["1"].reason
    layers = {layer["name"]: layer for layer in json.loads(report.to_json())["layers"]}
    assert layers["0"]["damaged"] and layers["0"]["error"] > 0.9 and not layers["1"]["damaged"]
    assert "damaged: error" in str(report)


def test_the_measured_error_of_a_damaged_layer_stays() -> None:
    model = scaled(mlp(256, 2), {"0.weight": 1e-4})
    report, _ = packed(model, "q6k", measure_error=True)
    assert report["0"].damaged and report["0"].error == pytest.approx(1.0, abs=0.05)
    assert report["1"].error is not None and report["1"].error < 0.02


def rows(part: slice) -> Callable[[Tensor], Tensor]:
    def small(w: Tensor) -> Tensor:
        w[part] *= 1e-6
        return w

    return small


def columns(w: Tensor) -> Tensor:
    w[:, : w.shape[1] // 2] *= 1e-6
    return w


PARTS = {
    "every second row": rows(slice(None, None, 2)),
    "every 16th row": rows(slice(5, None, 16)),
    "the last tenth": rows(slice(-200, None)),
    "one of three parts": rows(slice(700, 1400)),
    "half of the columns": columns,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["q6k", "q4_0", "hqq8", "q8_0", "afq4.f16"])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns first"])
def test_a_small_part_is_seen_beside_large_weights(part: str, name: str, turned: bool) -> None:
    fmt = get_format(name)
    w = PARTS[part](torch.randn(2048, 1024) * 0.02)
    if name == "afq4.f16":
        w = torch.where(w.abs() < 1e-3, w * 1e-3, w)  # its smallest scale is 1e-7
    elif name in ("q4_0", "hqq8"):
        w = torch.where(w.abs() < 1e-6, w * 0.1, w)
    bytes_ = ops.quantize(w, name, None, None)
    found = damage(w.t().contiguous().t() if turned else w, bytes_, fmt)
    assert found is not None and found.share > 0.05
    assert found.error < 2 * fmt.weight_error, "the large weights hide it"


def test_experts_are_looked_at_one_by_one() -> None:
    model = FusedMoE()
    stacks = [name for name, p in model.named_parameters() if p.dim() == 3]
    with torch.no_grad():
        model.get_parameter(stacks[0])[2] *= 1e-5
    report, alarms = packed(model, "q8_0")
    assert [layer.name for layer in report.damaged] == [stacks[0]] and len(alarms) == 1
    assert "in expert 2: error" in report[stacks[0]].reason


def test_layers_that_share_a_weight_are_both_marked() -> None:
    model = scaled(tiny_gpt2(), {"transformer.wte.weight": 1e-5})
    report, alarms = packed(model, "q6k")
    assert {"transformer.wte", "lm_head"} <= {layer.name for layer in report.layers if layer.damaged}
    assert [layer.name for layer in report.damaged] == ["transformer.wte"] and len(alarms) == 1


def test_conv1d_weights_are_looked_at_too() -> None:
    model = scaled(tiny_gpt2(), {"transformer.h.0.attn.c_attn.weight": 1e-4})
    report, _ = packed(model, "q6k")
    assert [layer.name for layer in report.damaged] == ["transformer.h.0.attn.c_attn"]


def test_importance_that_would_mislead_the_search_is_refused() -> None:
    model = mlp(256, 2)
    with pytest.raises(ValueError, match=r"layer '0' has importance 3e\+38, more than 2\*\*40"):
        packed(model, "q6k", imatrix={"0": torch.full((256,), 3e38), "1": torch.ones(256)})


def test_columns_that_do_not_count_may_be_given_up() -> None:
    model, importance = mlp(256, 2), torch.full((256,), 1e-12)
    importance[::16] = 1.0
    report, alarms = packed(model, "q4k", imatrix={"0": importance, "1": importance})
    assert not report.damaged and not alarms


def test_requantize_says_it_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = scaled(mlp(256, 2), {"0.weight": 1e-4})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    report, alarms = packed(model, "fp8")
    assert not report.damaged and not alarms
    for source in ("stored", tmp_path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = requantize_(model, "q6k" if source == "stored" else "q5k", source=source, progress=False)
        assert [layer.name for layer in report.damaged] == ["0"] and len(told(caught)) == 1
        assert told(caught)[0].startswith("requantize_: 1 layer lost")


def test_zeros_that_were_stored_are_exact() -> None:
    """What is lost already cannot be lost again."""
    model = scaled(mlp(256, 2), {"0.weight": 1e-9})
    packed(model, "q6k")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = requantize_(model, "q8_0", source="stored", progress=False)
    assert not report.damaged and not told(caught)


def test_requantize_changes_nothing_if_the_warning_is_an_error() -> None:
    model = scaled(mlp(256, 2), {"0.weight": 1e-4})
    packed(model, "fp8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="much more than usual"):
            requantize_(model, "q6k", source="stored", progress=False)
    assert model[0].format == model[1].format == "fp8"


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_weights_too_large_are_an_error_that_names_the_layer(fmt: QuantFormat) -> None:
    model = scaled(mlp(256, 2), {"1.weight": 1e10})
    if torch.float16 not in [part.dtype for part in fmt.parts]:
        report, alarms = packed(model, fmt.name)
        assert not report.damaged and not alarms
        return
    with pytest.raises(ValueError, match=r"quantize_: 1: .*too large for its 16-bit scale.*exclude"):
        quantize_(model, fmt.name, progress=False)


# ---- what is not said ------------------------------------------------------------------------------------------------


def usual() -> dict[str, Tensor]:
    n = torch.randn(32, 1024)
    t = {
        f"student-t {df}": torch.distributions.StudentT(float(df)).sample(n.shape).clamp(-1e4, 1e4) for df in (5, 2, 1)
    }
    outliers, zero_rows = n.clone(), n.clone()
    outliers[torch.rand(n.shape) < 1e-3] *= 100
    zero_rows[::2] = 0
    return {
        "normal": n,
        "uniform": torch.rand(n.shape) - 0.5,
        **t,
        "outliers": outliers,
        "outlier columns": n * (1 + 49 * (torch.arange(1024) % 97 == 0)),
        "rows of other sizes": n * torch.exp(1.5 * torch.randn(32, 1)),
        "log-normal": n.sign() * torch.exp(2 * torch.randn(n.shape)),
        "shifted": 50 + n,
        "sparse": n * (torch.rand(n.shape) < 0.1),
        "ternary": torch.randint(-1, 2, n.shape).float(),
        "signs": n.sign(),
        "constant": torch.full_like(n, 0.7),
        "zeros": torch.zeros_like(n),
        "rows of zeros": zero_rows,
        "low rank": torch.randn(32, 2) @ torch.randn(2, 1024),
    }


@every_variant
@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0])
def test_no_alarm_for_usual_weights(fmt: QuantFormat, size: float) -> None:
    for kind, w in usual().items():
        if (fmt.name, size, kind) == ("iq4_xs", 1e-3, "rows of other sizes"):
            continue  # d is 1/4064 of the largest weight, and ggml chooses the codes for a d that f16 cannot hold
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            weight = (w * size).clamp(-6e4, 6e4).to(dtype)
            assert damage(weight, ops.quantize(weight, fmt.name, None, None), fmt) is None, (kind, dtype)


@every_variant
def test_no_alarm_for_tiny_layers(fmt: QuantFormat) -> None:
    for seed in range(50):
        for shape in ((1, fmt.block), (3, fmt.block), (1, 2 * fmt.block)):
            w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
            for rule in (None, "search"):
                if has_rule(fmt, rule):
                    assert damage(w, ops.quantize(w, fmt.name, None, rule), fmt) is None


# ---- HQQ -------------------------------------------------------------------------------------------------------------


@every_hqq
@pytest.mark.parametrize("rule", [None, "search"])
@pytest.mark.parametrize("std", [2e-3, 1e-3, 1e-4, 1e-5, 5e-6])
def test_hqq_keeps_small_weights(fmt: QuantFormat, rule: str | None, std: float, impl: Any) -> None:
    """The hqq package makes a group of range 1e-4 a constant."""
    assert error_of(torch.randn(16, 512) * std, fmt, rule, impl) < 1.5 * fmt.weight_error


@every_hqq
def test_hqq_is_never_worse_than_zeros(fmt: QuantFormat, impl: Any) -> None:
    for std in (1e-7, 1e-9, 1e-30, 1e-38):
        assert error_of(torch.randn(16, 512) * std, fmt, None, impl) <= 1.0


@every_hqq
def test_hqq_groups_of_ordinary_size_keep_the_bytes_of_the_package(fmt: QuantFormat, impl: Any) -> None:
    """Small groups in the same matrix change neither their numbers nor the number of steps of the solver."""
    w = torch.randn(32, 512)
    w[1::2] *= 1e-5
    solved = hqq_solve(w.view(-1, fmt.block), fmt.bits, round_zero=fmt.bits == 4)
    got = fmt.unpack(impl.quantize(w, fmt.name, None, None).view(-1, fmt.block_bytes))
    ordinary = torch.arange(32).repeat_interleave(512 // fmt.block) % 2 == 0
    assert torch.equal(got["scale"][ordinary], solved.scale.half()[ordinary])
    torch.testing.assert_close(got["zero"][ordinary].float(), solved.zero[ordinary], rtol=2**-10, atol=1e-4)
    assert bool((got["scale"][~ordinary] < 5e-5).all())


@every_hqq
@pytest.mark.parametrize("rule", [None, "search"])
def test_hqq_small_groups_have_the_same_bytes_everywhere(
    fmt: QuantFormat, rule: str | None, impl: Any, float_mode: Callable[[Callable[[], None]], None]
) -> None:
    n = torch.randn(16, 512)
    offset = torch.logspace(-9, 0, 16)[:, None] * torch.where(torch.arange(16) % 2 == 0, 1, -1)[:, None]
    kinds = [n * 10.0**-power for power in range(2, 10)] + [offset + n * size for size in (0, 1e-9, 1e-6, 1e-5, 1e-4)]

    def check() -> None:
        for w in kinds:
            got, want = (of.quantize(w, fmt.name, None, rule) for of in (impl, reference))
            assert same_bits(got.view(-1).view(torch.int32).float(), want.view(-1).view(torch.int32).float())

    float_mode(check)


@every_hqq
@pytest.mark.parametrize("offset", [1e-6, -1e-4, 0.01, -0.09, 0.2, 1.0])
def test_hqq_small_groups_far_from_zero(fmt: QuantFormat, offset: float, impl: Any) -> None:
    for width in (1e-6, 1e-5, 1e-4):
        w = offset + torch.randn(16, 512) * width
        got = impl.dequantize(impl.quantize(w, fmt.name, None, None), fmt.name, torch.float32)
        step = max(float((w.max() - w.min()) / ((1 << fmt.bits) - 1)), abs(offset) / 2000, 2.0**-24)
        # or what the package makes of it: steps of 5e-5, and a constant where the range is below 1e-4
        assert float((got - w).abs().max()) <= max(1.1 * step, 1.1e-4 + abs(offset) / 2000)


# ---- others with small scales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1e-20, 1e-30, 1e-36])
@pytest.mark.parametrize("name", ["fp8", "q8k"])
def test_formats_with_32_bit_scales_hold_any_weights(name: str, std: float) -> None:
    fmt = get_format(name)
    w = torch.randn(16, 512) * std
    assert error_of(w, fmt) < fmt.weight_error
    assert damage(w, ops.quantize(w, name, None, None), fmt) is None


def test_fp8_scales_near_the_subnormal_numbers_of_f32() -> None:
    fmt = get_format("fp8")
    for std in (1e-38, 1e-40, 1e-42, 1e-44):
        w = torch.randn(16, 512) * std
        found = damage(w, ops.quantize(w, "fp8", None, None), fmt)
        assert (found is not None) == (error_of(w, fmt) > 2.5 * fmt.weight_error)


def test_bf16_scales_of_afq_end_at_1e_7() -> None:
    fmt = get_format("afq4")
    for std, lost in ((1e-5, False), (1e-9, True), (1e-38, True)):
        w = torch.randn(16, 512) * std
        assert (damage(w, ops.quantize(w, "afq4", None, None), fmt) is not None) == lost
