"""`linear` on the CPU: every instruction-set level against the exact product, for every format, on odd shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from helpers import (
    DTYPES,
    WIDE_FORMATS,
    LinearCase,
    allowed,
    before_a_guard_page,
    every_format,
    every_variant,
    int8_activations,
    linear_error,
    weight,
    wide_activations,
)

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
Activations = Callable[[int, int], torch.Tensor]


def normal_activations(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))


# Exact products take far longer than what is tested: every level is measured by the same ones.


@cache
def packed_weight(fmt: QuantFormat, rows: int, blocks: int) -> torch.Tensor:
    return ops.quantize(weight(fmt, rows=rows, blocks=blocks), fmt.name)


@cache
def case(
    fmt: QuantFormat, rows: int, blocks: int, rows_of_x: int, dtype: torch.dtype, activations: Activations
) -> LinearCase:
    x = activations(rows_of_x, blocks * fmt.block).to(dtype)
    return LinearCase.of(x, packed_weight(fmt, rows, blocks), fmt)


@pytest.fixture(autouse=True, scope="module")
def _forget_cases() -> Iterator[None]:
    yield
    case.cache_clear()
    packed_weight.cache_clear()


@every_format
@pytest.mark.parametrize("n", [1, 17, 48])
def test_odd_shapes(fmt: QuantFormat, isa: str, n: int) -> None:
    for rows_of_x in (1, 2, 3, 5, 7, 8, 9, 17, 33, 47):
        for dtype in DTYPES:
            known = case(fmt, n, 3, rows_of_x, dtype, normal_activations)
            y = ops.linear(known.x, known.packed, fmt.name)
            assert y.shape == (rows_of_x, n) and y.dtype == dtype
            assert known.error(y) <= allowed(fmt, y), (rows_of_x, dtype)


def kernel_of(fmt: QuantFormat, rows_of_x: int) -> str:
    """The kernel of `linear` that runs at the selected level."""
    kernels = ops.cpu_info().linear[fmt.name]
    return next(k.kernel for k in kernels if k.first <= rows_of_x and (k.last is None or rows_of_x <= k.last))


@every_variant
def test_exact_where_activations_are_int8(fmt: QuantFormat, isa: str) -> None:
    """Activations are rounded to int8 per 32, and nothing else is: any misplaced weight, scale or activation shows."""
    for weights in (256, 1280, 4096 + 256):
        for rows_of_x in (1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32):
            if "int8" not in kernel_of(fmt, rows_of_x):
                continue
            known = case(
                fmt,
                17 if rows_of_x > 4 else 9,
                max(1, weights // fmt.block),
                rows_of_x,
                torch.float32,
                int8_activations,
            )
            error = known.error(ops.linear(known.x, known.packed, fmt.name))
            assert error <= 1e-5, (weights, rows_of_x)


@pytest.mark.parametrize("name", WIDE_FORMATS)
def test_8_bit_codes_meet_activations_of_15_bits(name: str, isa: str) -> None:
    """Exact for such activations, largest codes included; and for others hardly any error, also beside outliers."""
    fmt = get_format(name)
    for weights in (256, 1280, 4096 + 256):
        for rows_of_x in (1, 2, 4, 5, 8, 9, 17, 32):
            kernel = kernel_of(fmt, rows_of_x)
            if "int8" not in kernel:
                assert kernel.startswith(("decoded", "bf16"))
                continue
            assert kernel.endswith("x in 15 bits")
            blocks = max(1, weights // fmt.block)
            known = case(fmt, 17, blocks, rows_of_x, torch.float32, wide_activations)
            assert known.error(ops.linear(known.x, known.packed, fmt.name)) <= 1e-6, (weights, rows_of_x)
            known = case(fmt, 17, blocks, rows_of_x, torch.float32, outliers)
            assert known.error(ops.linear(known.x, known.packed, fmt.name)) <= 5e-4, (weights, rows_of_x)


def outliers(rows: int, k: int) -> torch.Tensor:
    """Activations with a few channels that are fifty times larger, as those of language models."""
    x = normal_activations(rows, k)
    x[:, 7::512] *= 50
    return x


@pytest.mark.parametrize("name", WIDE_FORMATS)
def test_largest_sums_do_not_overflow(name: str, isa: str) -> None:
    """All codes and all activations at their ends, and of one sign: the integer sums are as large as they can be."""
    fmt = get_format(name)
    for sign in (1.0, -1.0):
        w = torch.full((16, 2 * 512), sign)
        w[:, :: fmt.block] = 0.0  # affine formats: the others get the largest code
        packed = ops.quantize(w, fmt.name)
        for rows_of_x in (1, 4, 8, 24):
            x = torch.full((rows_of_x, w.shape[1]), 3.0)
            x[1::2] *= -1
            y = ops.linear(x, packed, fmt.name)
            torch.testing.assert_close(y, x @ ops.dequantize(packed, fmt.name, torch.float32).t(), rtol=2e-4, atol=1e-2)


@every_format
def test_any_number_of_blocks(fmt: QuantFormat, isa: str) -> None:
    for blocks in (1, 2, 15, 16, 17, 1 + 2048 // fmt.block, 5000 // fmt.block):
        for rows_of_x in (1, 6, 12):
            known = case(fmt, 3, blocks, rows_of_x, torch.float32, normal_activations)
            y = ops.linear(known.x, known.packed, fmt.name)
            assert known.error(y) <= allowed(fmt, y), (blocks, rows_of_x)


@every_format
def test_rows_of_x_together_give_the_bits_of_each_alone(fmt: QuantFormat, isa: str) -> None:
    """Few rows of x are multiplied part by part of their length, and in another order of bytes than one row."""
    blocks = 4096 // fmt.block + 1  # several parts, and a unit that is not full
    packed = packed_weight(fmt, 35, blocks)  # more weight rows than share a part
    x = torch.randn(8, blocks * fmt.block, generator=torch.Generator().manual_seed(8))
    alone = torch.cat([ops.linear(row[None], packed, fmt.name) for row in x])
    kernel = kernel_of(fmt, 1)
    for rows_of_x in range(2, 9):
        if kernel_of(fmt, rows_of_x) != kernel:
            break  # AMX tiles add in another order
        assert torch.equal(ops.linear(x[:rows_of_x], packed, fmt.name), alone[:rows_of_x]), rows_of_x
    else:
        return
    assert rows_of_x > 4


@every_format
@pytest.mark.parametrize("rows_of_x", [3, 6, 13, 20])
def test_each_row_of_x_has_its_own_result(fmt: QuantFormat, isa: str, rows_of_x: int) -> None:
    """Rows of very different size, zeros, NaN and infinity: none may leak into another."""
    packed = packed_weight(fmt, 21, 4)
    x = torch.randn(rows_of_x, 4 * fmt.block, generator=torch.Generator().manual_seed(4))
    x[0] *= 1e20
    x[1] = 0
    x[-1] *= 1e-20
    clean = ops.linear(x, packed, fmt.name)
    assert (clean[1] == 0).all()
    for row in (0, -1):
        assert linear_error(clean[row], x[row], packed, fmt) <= allowed(fmt, clean[row])
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoilt = x.clone()
        spoilt[1, 7] = bad
        y = ops.linear(spoilt, packed, fmt.name)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, *range(2, rows_of_x)]], clean[[0, *range(2, rows_of_x)]])


@every_variant
@pytest.mark.parametrize("gap", [0, 1])
def test_nothing_is_read_beyond_the_end(fmt: QuantFormat, isa: str, gap: int) -> None:
    """Weights, x and bias end where readable memory ends, as in mapped files; with a gap of 1, weights start at odd addresses."""
    unit = 512 // fmt.block
    for rows, blocks in ((1, 1), (5, unit), (2, unit + 1), (3, 2 * unit - 1)):
        packed = packed_weight(fmt, rows, blocks)
        at_end = before_a_guard_page(packed, gap)
        bias = torch.randn(rows)
        for rows_of_x, dtype in (
            (1, torch.float32),
            (3, torch.bfloat16),
            (8, torch.float16),
            (13, torch.float32),
            (17, torch.float32),
        ):
            x = torch.randn(rows_of_x, blocks * fmt.block, dtype=dtype)
            y = ops.linear(before_a_guard_page(x), at_end, fmt.name, before_a_guard_page(bias))
            torch.testing.assert_close(y, ops.linear(x, packed, fmt.name, bias), rtol=1e-4, atol=1e-3)
