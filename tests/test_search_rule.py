"""rule="search": affine and HQQ groups whose two numbers are looked for, with and without importance."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from helpers import ALL_FORMATS, FORMATS, relative_error, run_flushing_denormals, weight
from models import mlp
from torch import Tensor

import isqtorch
from isqtorch import ops
from isqtorch.formats import QuantFormat
from isqtorch.quantizers import has_rule

SEARCHED = [fmt for fmt in ALL_FORMATS if has_rule(fmt, "search")]
every_variant = pytest.mark.parametrize("fmt", SEARCHED, ids=lambda fmt: fmt.name)
every_format = pytest.mark.parametrize("fmt", [f for f in SEARCHED if f in FORMATS], ids=lambda fmt: fmt.name)


@cache
def hard(fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Zeros, constants, outliers, one sign, tiny, far from zero; and importance with a dead group and a single live column."""
    w = weight(fmt, rows=8, blocks=5) * 0.03
    w[1] = 0
    w[2, : fmt.block] = 0.7
    w[3] = -w[3].abs()
    w[4, ::17] *= 50
    w[5] *= 1e-6
    w[6] = 3 + w[6] * 0.1
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) ** 3
    importance[: fmt.block] = 0
    importance[fmt.block : 2 * fmt.block - 1] = 0
    return w, importance


def cost(fmt: QuantFormat, w: Tensor, packed: Tensor, importance: Tensor | None) -> Tensor:
    """What each group's error costs, in f64: `[groups]`."""
    decoded = ops.reference.dequantize(packed, fmt.name, torch.float32)
    groups, off = (t.double().reshape(-1, fmt.block) for t in (w, decoded - w))
    counts = (groups.square().mean(1, keepdim=True) + groups.square()).sqrt()
    if importance is not None:
        counts *= importance.double().expand_as(w).reshape(-1, fmt.block)
    return (counts * off.square()).sum(1)


# ---- the search itself -----------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_no_group_gets_worse(fmt: QuantFormat, weighted: bool) -> None:
    w, importance = hard(fmt)
    given = importance if weighted else None
    before, after = (cost(fmt, w, ops.quantize(w, fmt.name, given, rule), given) for rule in (None, "search"))
    assert bool((after <= before * (1 + 1e-5)).all())
    assert bool((after < 0.99 * before).any())


# By bits: how much smaller the search must make the relative error of normal weights. 16-bit offsets bound it at 8 bits.
_AT_MOST = {2: 0.90, 3: 0.90, 4: 0.95, 5: 0.95, 6: 0.96, 8: 0.98}


@every_format
def test_the_error_falls(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=64, blocks=1024 // fmt.block)
    plain, searched = (
        relative_error(ops.dequantize(ops.quantize(w, fmt.name, rule=rule), fmt.name, torch.float32), w)
        for rule in (None, "search")
    )
    assert searched <= _AT_MOST[fmt.bits] * plain, searched / plain


@every_format
def test_importance_moves_the_error_to_columns_that_do_not_matter(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=64, blocks=1024 // fmt.block)
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) ** 4 * 10 + 0.01
    without, given = (
        cost(fmt, w, ops.quantize(w, fmt.name, vector, "search"), importance).sum() for vector in (None, importance)
    )
    assert given < (0.92 if fmt.bits == 8 else 0.9) * without, given / without


@every_format
def test_groups_without_importance_are_as_by_default(fmt: QuantFormat) -> None:
    w, _ = hard(fmt)
    nothing = ops.quantize(w, fmt.name, torch.zeros(w.shape[1]), "search")
    assert torch.equal(nothing, ops.quantize(w, fmt.name))
    assert not bool(ops.dequantize(ops.quantize(w, fmt.name, rule="search"), fmt.name, torch.float32)[1].any())


# ---- native against reference ----------------------------------------------------------------------------------------


@cache
def expected(fmt: QuantFormat, weighted: bool) -> Tensor:
    w, importance = hard(fmt)
    return ops.reference.quantize(w, fmt.name, importance if weighted else None, "search")


@every_variant
def test_native_equals_the_reference(fmt: QuantFormat, format_isa: str) -> None:
    w, importance = hard(fmt)
    assert torch.equal(ops.quantize(w, fmt.name, None, "search"), expected(fmt, False))
    assert torch.equal(ops.quantize(w, fmt.name, importance, "search"), expected(fmt, True))


@every_format
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-8, 1e4, 1e15, 1e30])
def test_extreme_weights_give_the_reference_bytes_or_refusal(fmt: QuantFormat, scale: float) -> None:
    w, importance = weight(fmt, rows=3, blocks=3) * scale, torch.rand(3 * fmt.block)
    results = []
    for quantize in (ops.reference.quantize, ops.quantize):
        try:
            results.append(quantize(w, fmt.name, importance, "search").tolist())
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]


@every_format
def test_16_bit_weights_and_stacks(fmt: QuantFormat) -> None:
    stack = weight(fmt, rows=6).view(2, 3, -1).bfloat16()
    vectors = torch.rand(2, stack.shape[-1])
    packed = ops.quantize(stack, fmt.name, vectors, "search")
    assert torch.equal(packed, ops.reference.quantize(stack, fmt.name, vectors, "search"))
    for e in range(2):
        assert torch.equal(packed[e], ops.quantize(stack[e].float(), fmt.name, vectors[e], "search"))
    assert ops.quantize(stack[:, :0], fmt.name, vectors, "search").shape == (2, 0, packed.shape[-1])
    assert ops.reference.quantize(stack[:0], fmt.name, vectors[:0], "search").shape == (0, 3, packed.shape[-1])


@every_format
def test_threads_and_flushed_denormals_change_nothing(fmt: QuantFormat) -> None:
    w = torch.cat([weight(fmt, rows=40, blocks=8) * scale for scale in (1.0, 1e-7, 1e-19)])
    importance = torch.rand(w.shape[1]) * 1e-6
    packed = ops.quantize(w, fmt.name, importance, "search")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.quantize(w, fmt.name, importance, "search"), packed)
    finally:
        torch.set_num_threads(before)

    def check() -> None:
        assert torch.equal(ops.quantize(w, fmt.name, importance, "search"), packed)

    run_flushing_denormals(check)


# ---- quantize_ -------------------------------------------------------------------------------------------------------


def packed_mlp(**options: Any) -> tuple[torch.nn.Module, isqtorch.QuantReport]:
    model = mlp()
    return model, isqtorch.quantize_(model, "afq3", progress=False, **options)


def stored(model: torch.nn.Module, layer: str) -> Tensor:
    return model.get_submodule(layer).weight


def test_a_rule_goes_to_the_formats_that_have_it() -> None:
    model, report = packed_mlp(rule="search", topology={"/^2$/": "q8_0"})
    assert torch.equal(stored(model, "0"), ops.quantize(stored(mlp(), "0"), report["0"].stored, rule="search"))
    assert torch.equal(stored(model, "2"), ops.quantize(stored(mlp(), "2"), "q8_0"))
    assert "1 layers have formats without a rule 'search': 2" in report.notes
    assert report.rule == "search" and report.to_dict()["rule"] == "search"


NO_RULE = {
    "promoted": (
        "q4k",
        {"rule": "search"},
        "^quantize_: q4k has no rule 'search', only afq2 .* hqq8 have. .*leave rule",
    ),
    "of another family": (
        "hqq4",
        {"rule": "mlx"},
        "^quantize_: hqq4 has no rule 'mlx', only afq2 afq3 [a-z0-9 ]* have",
    ),
    "several": (
        "q8_0",
        {"rule": "mlx", "topology": {"/2/": "q5_0"}},
        "^quantize_: q8_0, q5_0 have no rule 'mlx', only",
    ),
    "by bits": (8, {"rule": "search"}, "^quantize_: q8_0 has no rule 'search'"),
    "unknown": (
        "afq4",
        {"rule": "best"},
        "^quantize_: rule must be None, which .*, or one of search, mlx, feedback; got 'best'",
    ),
    "not a name": ("q4k", {"rule": 3}, "^quantize_: rule must be None, .*; got 3"),
}


@pytest.mark.parametrize("case", NO_RULE)
def test_a_rule_that_no_format_has(case: str) -> None:
    """The message names what was asked for, and not the format that a layer was promoted to."""
    fmt, options, message = NO_RULE[case]
    head = torch.nn.Linear(256, 64)
    model = torch.nn.ModuleDict({"0": mlp(), "lm_head": head})  # a head of q4k is promoted to q6k
    with pytest.raises(ValueError, match=message) as caught:
        isqtorch.quantize_(model, fmt, progress=False, **options)
    assert "q6k" not in str(caught.value) and "quantize: " not in str(caught.value)
    assert model["lm_head"] is head and type(model["0"][0]) is torch.nn.Linear


def test_a_rule_of_layers_that_are_not_packed_again_is_no_fault() -> None:
    model, _ = packed_mlp(rule="search")
    assert isqtorch.requantize_(model, "afq3", source="stored", rule="mlx").layers


def test_importance_is_used_with_the_search_and_only_then() -> None:
    vector = torch.rand(256, generator=torch.Generator().manual_seed(3))
    vector[:32] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no alarm about columns without importance: such groups are as by default
        model, report = packed_mlp(rule="search", imatrix={"0": vector})
        plain, told = packed_mlp(imatrix={"0": vector})
    fmt = report["0"].stored
    assert torch.equal(stored(model, "0"), ops.quantize(stored(mlp(), "0"), fmt, vector, "search"))
    assert report.imatrix == "imatrix" and not any("take it only" in note for note in report.notes)
    assert torch.equal(stored(plain, "0"), ops.quantize(stored(mlp(), "0"), fmt))
    assert told.imatrix is None and any("take it only with rule='search'" in note for note in told.notes)
