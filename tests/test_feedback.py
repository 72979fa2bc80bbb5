"""Error feedback: codes that make up for each other's errors. How good they are, and that all implementations choose the
same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from feedback_cases import by_feedback, by_importance, columns_for, loss, moments, ratio, weights
from helpers import (
    FORMATS,
    IMPLEMENTATIONS,
    before_a_guard_page,
    every_dtype,
    every_format,
    every_variant,
    implementation,
)
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format
from isqtorch.quantizers import feedback, feedback_factor, has_rule, scale_rule

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

EACH_LEVEL = [name.removeprefix("native-") for name in IMPLEMENTATIONS if name != "reference"]


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with the kernels of one level of instruction sets."""
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa("")


# ---- how good the codes are ---------------------------------------------------------------------------------------------


@every_variant
def test_all_formats_have_the_rule(fmt: QuantFormat) -> None:
    assert has_rule(fmt, "feedback")
    with pytest.raises(ValueError, match="'feedback' needs the second moments"):
        ops.quantize(torch.zeros(2, fmt.block), fmt.name, None, "feedback")


@pytest.mark.parametrize("name", IMPLEMENTATIONS[:2])
@every_variant
def test_uncorrelated_inputs_give_the_bytes_of_the_quantizer(fmt: QuantFormat, name: str) -> None:
    columns = columns_for(fmt)
    w = weights(9, columns)
    w[2] = 0
    w[3, :40] = 0
    w[4] *= 1e-7
    w[5, 7] = 100
    for importance in (torch.ones(columns), torch.rand(columns, generator=torch.Generator().manual_seed(2))):
        factor = feedback_factor(importance.diag())
        for rule in {None, scale_rule(fmt), "mlx" if has_rule(fmt, "mlx") else None}:
            packed = implementation(name).quantize_feedback(w, fmt.name, factor, importance, rule)
            assert torch.equal(packed, ops.quantize(w, fmt.name, importance, rule)), rule


@every_format
def test_correlated_inputs(fmt: QuantFormat) -> None:
    h, w = moments(columns_for(fmt)), weights(16, columns_for(fmt))
    assert ratio(w, fmt, h) < 0.75


@every_format
def test_one_row_of_one_block(fmt: QuantFormat) -> None:
    losses = torch.zeros(2)
    for seed in range(8):
        h, w = moments(fmt.block, seed), weights(1, fmt.block, seed)
        packed = by_feedback(w, fmt, h)
        assert packed.shape == (1, fmt.block_bytes)
        losses += torch.tensor([loss(w, packed, fmt, h), loss(w, by_importance(w, fmt, h), fmt, h)])
    assert losses[0] < 0.8 * losses[1]


@every_format
def test_inputs_that_are_all_the_same(fmt: QuantFormat) -> None:
    """Only the sum of a row's errors counts. With feedback, it is hardly more than one error."""
    columns = columns_for(fmt)
    h, w = torch.ones(columns, columns), weights(16, columns)
    assert ratio(w, fmt, h) < 0.3


@every_format
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_small_and_large_weights(fmt: QuantFormat, scale: float) -> None:
    h, w = moments(columns_for(fmt)), weights(16, columns_for(fmt)) * scale
    w[3] = 0
    packed = by_feedback(w, fmt, h)
    assert torch.equal(ops.dequantize(packed[3:4], fmt.name, torch.float32), torch.zeros(1, w.shape[1]))
    assert loss(w, packed, fmt, h) < 0.95 * loss(w, by_importance(w, fmt, h), fmt, h)


@every_format
@every_dtype
def test_types_of_weights(fmt: QuantFormat, dtype: torch.dtype) -> None:
    h, w = moments(columns_for(fmt)), weights(5, columns_for(fmt)).to(dtype)
    packed = by_feedback(w, fmt, h)
    assert torch.equal(packed, by_feedback(w.float(), fmt, h))
    assert torch.equal(packed, by_feedback(w.double(), fmt, h))
    assert torch.equal(packed, by_feedback(w.t().contiguous().t(), fmt, h, feedback_factor(h).t().contiguous().t()))


@every_variant
def test_blocks_are_as_the_format_wants_them(fmt: QuantFormat) -> None:
    h, w = moments(columns_for(fmt)), weights(7, columns_for(fmt))
    blocks = by_feedback(w, fmt, h).view(-1, fmt.block_bytes)
    fields = fmt.unpack(blocks)
    assert torch.equal(fmt.pack(fields), blocks)
    assert fmt.fault(blocks) is None
    assert set(fields["q"].unique().tolist()) <= set(fmt.codes) | {8 if fmt.name == "mxfp4" else 0}
    if "bsums" in fields:
        assert torch.equal(fields["bsums"], fields["q"].view(-1, 16, 16).sum(2).short())
    if "s" in fields:
        d = fields["d"].float()
        torch.testing.assert_close(fields["s"].float(), d * fields["q"].sum(1), rtol=2e-3, atol=1e-3)


@every_variant
def test_codes_are_listed_in_the_order_of_the_weights(fmt: QuantFormat) -> None:
    fields = fmt.unpack(ops.quantize(weights(8, columns_for(fmt)), fmt.name).view(-1, fmt.block_bytes))
    levels = torch.stack([fmt.decode({**fields, "q": torch.full_like(fields["q"], code)}) for code in fmt.codes])
    steps = levels.diff(dim=0)
    assert bool(((steps >= 0).all(dim=0) | (steps <= 0).all(dim=0)).all())
    assert len(set(fmt.codes)) == len(fmt.codes) >= (1 << fmt.bits) - 3


def by_the_inverse(w: Tensor, fmt: QuantFormat, h: Tensor) -> Tensor:
    """Pack in q4k by the method's usual form: the Cholesky factor of the inverse, columns from left to right, once."""
    damped = h.double() + torch.eye(len(h)) * 0.01 * h.diagonal().mean() + torch.diag((h.diagonal() == 0).double())
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rest, parts = w.double(), []
    for start in range(0, len(h), 256):
        block = rest[:, start : start + 256].float()
        fields = fmt.unpack(ops.quantize(block, fmt.name, h.diagonal()[start : start + 256].contiguous()))
        low = fmt.decode({**fields, "q": torch.zeros_like(fields["q"])})
        step = fmt.decode({**fields, "q": torch.ones_like(fields["q"])}) - low
        for i in range(256):
            at = start + i
            code = ((rest[:, at] - low[:, i]) / step[:, i]).nan_to_num().round().clamp(0, 15)
            error = (rest[:, at] - code * step[:, i] - low[:, i]) / u[at, at]
            rest[:, at + 1 :] -= error[:, None] * u[at, at + 1 :]
            fields["q"][:, i] = code.byte()
        parts.append(fmt.pack(fields))
    return torch.cat(parts, dim=1)


def test_the_same_codes_as_by_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """From left to right and without the sweep, the reference is the usual method."""
    fmt = get_format("q4k")
    h, w = moments(512), weights(16, 512)
    theirs = by_the_inverse(w, fmt, h)
    assert loss(w, by_feedback(w, fmt, h), fmt, h) < 0.87 * loss(w, theirs, fmt, h)
    monkeypatch.setattr(feedback, "best_order", lambda c: None)
    monkeypatch.setattr(feedback, "_sweep", lambda parts, x, u: None)
    ours = ops.reference.quantize_feedback(w, fmt.name, feedback_factor(h), h.diagonal().contiguous())
    codes = [fmt.unpack(packed.view(-1, fmt.block_bytes))["q"] for packed in (ours, theirs)]
    assert (codes[0] == codes[1]).double().mean() > 0.99
    # One code on the edge changes the targets of all columns after it, and the two factors differ in their last bits.
    assert abs(loss(w, ours, fmt, h) / loss(w, theirs, fmt, h) - 1) < 5e-3


@every_format
def test_choosing_again_never_makes_a_row_worse(fmt: QuantFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the slab is the whole row, so that nothing behind it has still to make up for anything."""
    h, w = moments(256), weights(40, 256)
    damped = h.double() + torch.eye(256) * 0.01 * h.diagonal().mean()
    arguments = (w, fmt.name, feedback_factor(h), h.diagonal().contiguous(), scale_rule(fmt))

    def losses() -> Tensor:
        d = ops.dequantize(ops.reference.quantize_feedback(*arguments), fmt.name, torch.float32).double() - w.double()
        return ((d @ damped) * d).sum(1)

    after = losses()
    monkeypatch.setattr(feedback, "_sweep", lambda parts, x, u: None)
    before = losses()
    assert bool((after <= before * (1 + 1e-5)).all())
    assert after.sum() < 0.998 * before.sum()


# ---- all implementations choose the same ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", EACH_LEVEL, indirect=True)
@every_variant
def test_native_bytes_are_those_of_the_reference(fmt: QuantFormat, level: str) -> None:
    rules = {None, scale_rule(fmt), "mlx" if has_rule(fmt, "mlx") else None}
    for rows, blocks in ((1, 1), (5, 2), (67, 3)):
        columns = blocks * fmt.block
        h, w = moments(columns, seed=blocks), weights(rows, columns)
        factor, importance = feedback_factor(h), h.diagonal().contiguous()
        w[rows // 2] = 0
        w[rows // 3, :20] *= 1e-6
        w[rows - 1] = 3.3
        for rule in rules:
            want = ops.reference.quantize_feedback(w, fmt.name, factor, importance, rule)
            assert torch.equal(ops.quantize_feedback(w, fmt.name, factor, importance, rule), want), (rows, blocks, rule)


@pytest.mark.parametrize("level", EACH_LEVEL, indirect=True)
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q3k", "iq4_nl", "afq4", "fp8"])
def test_rows_wider_than_a_slab(name: str, level: str) -> None:
    """The native kernel takes columns in slabs of 256 and earlier columns 128 at a time."""
    fmt = get_format(name)
    columns = 256 * 4 if fmt.block == 256 else 256 * 4 + fmt.block
    h, w = moments(columns), weights(3, columns)
    factor, importance = feedback_factor(h), h.diagonal().contiguous()
    want = ops.reference.quantize_feedback(w, name, factor, importance, scale_rule(fmt))
    assert torch.equal(by_feedback(w, fmt, h, factor), want)


@pytest.mark.parametrize("level", EACH_LEVEL, indirect=True)
@pytest.mark.parametrize("name", ["q8_0", "q8k", "q4k", "fp8", "mxfp4", "afq3"])
def test_factors_that_f32_cannot_hold_together(name: str, level: str) -> None:
    """The curvature of a slab or block is not positive definite in f32, or overflows: nothing is ordered or swept."""
    fmt = get_format(name)
    columns = 256 + fmt.block
    w = weights(5, columns) * 1e-3
    random = weights(columns, columns, seed=3)
    singular = random.triu(1) + 1e-3 * random.diagonal().abs().diag() + 1e-6 * torch.eye(columns)
    large = torch.eye(columns)
    large[3, 20] = large[fmt.block + 2, fmt.block + 9] = 1e21
    huge = torch.eye(columns) * 3e38
    huge[3, 20] = 2
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(2))
    for factor in (singular, large, huge):
        found = []
        for operators in (ops.reference, ops):
            try:
                found.append(operators.quantize_feedback(w, name, factor, importance, scale_rule(fmt)).tolist())
            except ValueError as error:
                found.append(str(error))
        assert found[0] == found[1]


@pytest.mark.parametrize("level", EACH_LEVEL, indirect=True)
@every_format
def test_reads_nothing_behind_its_arguments(fmt: QuantFormat, level: str) -> None:
    columns = columns_for(fmt)
    h, w = moments(columns), weights(5, columns).bfloat16()
    arguments = (feedback_factor(h), h.diagonal().contiguous())
    packed = ops.quantize_feedback(w, fmt.name, *arguments)
    guarded = [before_a_guard_page(argument) for argument in arguments]
    assert torch.equal(ops.quantize_feedback(before_a_guard_page(w), fmt.name, *guarded), packed)


@every_format
def test_any_number_of_threads(fmt: QuantFormat) -> None:
    columns = columns_for(fmt)
    h, w = moments(columns), weights(300, columns)
    factor = feedback_factor(h)  # torch's Cholesky decomposition does depend on threads
    expected = by_feedback(w, fmt, h, factor)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(by_feedback(w, fmt, h, factor), expected), threads
    finally:
        torch.set_num_threads(before)
    if fmt.solver != "hqq":
        assert torch.equal(by_feedback(w[37:38], fmt, h, factor), expected[37:38])


def test_rows_do_not_know_each_other_but_for_the_steps_of_hqq() -> None:
    fmt = get_format("hqq4")
    h, w = moments(256), weights(20, 256)
    whole, first = by_feedback(w, fmt, h), by_feedback(w[:4], fmt, h)
    assert abs(loss(w[:4], whole[:4], fmt, h) / loss(w[:4], first, fmt, h) - 1) < 0.05


def test_no_rows() -> None:
    for fmt in FORMATS:
        h = moments(columns_for(fmt))
        w = torch.empty(0, columns_for(fmt))
        for operators in (ops.reference, ops):
            packed = operators.quantize_feedback(w, fmt.name, feedback_factor(h), h.diagonal().contiguous())
            assert packed.shape == (0, fmt.row_bytes(w.shape[1]))
