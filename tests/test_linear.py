"""`linear` on the CPU: every instruction-set level against the exact product, for every format, on odd shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import ALL_FORMATS, DTYPES, FORMATS, ROUNDING, linear_error, weight

from isqtorch import ops
from isqtorch.formats import QuantFormat

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ops.cpu_info().isa_supported)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa("")


def allowed(fmt: QuantFormat, y: torch.Tensor) -> float:
    """The format's bound is for the RMS of many outputs; few may lie three deviations off."""
    return fmt.linear_error * (1 + 3 / y.numel() ** 0.5) + ROUNDING[y.dtype]


def int8_activations(rows: int, k: int) -> torch.Tensor:
    """Rows that rounding to int8 per 32 does not change: integers up to 127, times a power of two per 32."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, (rows, k), generator=generator).float()
    x[:, ::32] = 127
    return x * 2.0 ** torch.randint(-9, 9, (rows, k // 32), generator=generator).repeat_interleave(32, 1)


@every_format
@pytest.mark.parametrize("n", [1, 17, 48])
def test_odd_shapes(fmt: QuantFormat, isa: str, n: int) -> None:
    packed = ops.quantize(weight(fmt, rows=n, blocks=3), fmt.name)
    for rows_of_x in (1, 2, 3, 5, 7, 8, 9, 17, 33):
        for dtype in DTYPES:
            x = torch.randn(rows_of_x, 3 * fmt.block, generator=torch.Generator().manual_seed(rows_of_x)).to(dtype)
            y = ops.linear(x, packed, fmt.name)
            assert y.shape == (rows_of_x, n) and y.dtype == dtype
            assert linear_error(y, x, packed, fmt) <= allowed(fmt, y), (rows_of_x, dtype)


@every_variant
def test_exact_where_activations_are_int8(fmt: QuantFormat, isa: str) -> None:
    """Few rows are rounded to int8 per 32, and nothing else is: any misplaced weight, scale or activation shows."""
    for weights in (256, 1280, 4096 + 256):
        blocks = max(1, weights // fmt.block)
        packed = ops.quantize(weight(fmt, rows=9, blocks=blocks), fmt.name)
        for rows_of_x in (1, 2, 4, 7):
            x = int8_activations(rows_of_x, blocks * fmt.block)
            assert linear_error(ops.linear(x, packed, fmt.name), x, packed, fmt) <= 1e-5, (weights, rows_of_x)


@every_format
def test_any_number_of_blocks(fmt: QuantFormat, isa: str) -> None:
    for blocks in (1, 2, 15, 16, 17, 1 + 2048 // fmt.block, 5000 // fmt.block):
        packed = ops.quantize(weight(fmt, rows=3, blocks=blocks), fmt.name)
        for rows_of_x in (1, 12):
            x = torch.randn(rows_of_x, blocks * fmt.block, generator=torch.Generator().manual_seed(3))
            y = ops.linear(x, packed, fmt.name)
            assert linear_error(y, x, packed, fmt) <= allowed(fmt, y), (blocks, rows_of_x)


@every_format
@pytest.mark.parametrize("rows_of_x", [3, 20])
def test_each_row_of_x_has_its_own_result(fmt: QuantFormat, isa: str, rows_of_x: int) -> None:
    """Rows of very different size, zeros, NaN and infinity: none may leak into another."""
    packed = ops.quantize(weight(fmt, rows=21, blocks=4), fmt.name)
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
