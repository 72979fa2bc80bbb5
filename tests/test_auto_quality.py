"""What choosing formats by measurement buys: the demo model, measured on text it was trained on, judged on text it was not.

Sizes are equal to the byte: "auto" gets the bytes that a plain format takes, with its promotions and without, and both
use the same importance matrix.
"""

from __future__ import annotations

import copy
from functools import cache
from math import exp, log
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from test_imatrix_quality import CONTEXT, DEMO, calibrated, demo

import isqtorch
from isqtorch.auto.curvature import measure_curvature

AT_MOST = 0.9  # of the divergence of the plain format at the same size


@cache
def quantized(fmt: str, everywhere: bool = False) -> tuple[int, float, float]:
    """(bytes, divergence with importance, divergence without) of a plain format or a mix."""
    topology = {"/./": fmt} if everywhere else None
    (report, weighted), (_, plain) = (divergence(fmt, topology=topology, imatrix=im) for im in (calibrated(), None))
    return report.bytes_after, weighted, plain


def divergence(fmt: str, **options: Any) -> tuple[isqtorch.QuantReport, float]:
    model, _, ids, reference = demo()
    model = copy.deepcopy(model)
    report = isqtorch.quantize_(model, fmt, progress=False, **options)
    return report, isqtorch.kl_divergence(model, reference, ids, context=CONTEXT, batch=4).mean


def auto(**budget: Any) -> tuple[isqtorch.QuantReport, float]:
    text = {"calibration_file": DEMO / "calibration.txt", "tokenizer": demo()[1]}
    return divergence("auto", imatrix=calibrated(), **text, **budget)


@pytest.mark.parametrize(
    ("fmt", "everywhere"),
    [
        pytest.param("q4k", False, id="q4k-promoted"),
        pytest.param("q4k", True, id="q4k", marks=pytest.mark.slow),
        pytest.param("q3k", False, id="q3k-promoted", marks=pytest.mark.slow),
        pytest.param("q3k", True, id="q3k", marks=pytest.mark.slow),
        pytest.param("q4k_m", False, id="q4k_m", marks=pytest.mark.slow),
        pytest.param("q3k_m", False, id="q3k_m", marks=pytest.mark.slow),
    ],
)
def test_auto_diverges_less_at_equal_size(fmt: str, everywhere: bool) -> None:
    size, weighted, plain = quantized(fmt, everywhere)
    report, kl = auto(max_size=size)
    assert report.bytes_after <= size
    print(
        f"{fmt}{' everywhere' if everywhere else ''}, {size} bytes, {report.bits_per_weight:.3f} bpw: mean KL {plain:.6f}, with "
        f"importance {weighted:.6f}, auto {kl:.6f} ({100 * (kl / weighted - 1):+.1f} %)"
    )
    assert kl < AT_MOST * weighted, (kl, weighted)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "fmt"), [(4.5, "q4k"), (3.5, "q3k")])
def test_auto_at_a_target_beats_the_plain_format(target: float, fmt: str) -> None:
    """4.5 and 3.5 bits per weight of the whole model, against 4.52 and 3.45 (the formats everywhere, with norms in float)."""
    size, weighted, plain = quantized(fmt, everywhere=True)
    report, kl = auto(target_bpw=target)
    assert report.bits_per_weight <= target
    print(f"auto at {target}: mean KL {kl:.6f}; {fmt} ({size} bytes): {plain:.6f}, with importance {weighted:.6f}")
    assert kl < AT_MOST * weighted, (kl, weighted)


@pytest.mark.slow
def test_without_a_text_auto_is_no_worse_than_the_plain_format() -> None:
    size, weighted, plain = quantized("q4k")
    for imatrix, reference in ((calibrated(), weighted), (None, plain)):
        _, kl = divergence("auto", max_size=size, imatrix=imatrix)
        print(
            f"auto without a text, {'with' if imatrix else 'without'} importance: mean KL {kl:.6f}, q4k {reference:.6f}"
        )
        assert kl <= 1.02 * reference
    size, weighted, _ = quantized("q3k", everywhere=True)
    _, kl = divergence("auto", max_size=size, imatrix=calibrated())
    print(f"auto without a text at {size} bytes: mean KL {kl:.6f}, q3k {weighted:.6f}")
    assert kl < 0.8 * weighted


def test_the_curvature_predicts_the_divergence_of_single_layers() -> None:
    model, tokenizer, ids, _ = demo()
    names = ["model.embed_tokens"]
    names += [
        f"model.layers.{i}.{leaf}"
        for i in (0, 3, 7)
        for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    curvature = measure_curvature(model, names, tokenizer, DEMO / "calibration.txt", progress=False)
    ids = ids[: 16 * CONTEXT]
    reference = isqtorch.reference_logits(model, ids, context=CONTEXT, batch=4)
    ratios = []
    for name in names:
        copied = copy.deepcopy(model)
        weight = copied.get_submodule(name).weight
        with torch.no_grad():
            error = isqtorch.quantize(weight, "q4k").dequantize() - weight
            weight.add_(error)
        measured = isqtorch.kl_divergence(copied, reference, ids, context=CONTEXT, batch=4).mean
        rows, columns = curvature[name]
        ratios.append(float(rows @ error.double().square() @ columns) / measured)
        print(f"{name}: predicted {ratios[-1] * measured:.2e}, measured {measured:.2e}")
    logs = [log(ratio) for ratio in ratios]
    print(
        f"predicted / measured: {exp(mean(logs)):.2f}, spread {stdev(logs):.2f} (standard deviation of the logarithm)"
    )
    assert 0.7 < exp(mean(logs)) < 1.3 and stdev(logs) < 0.3
