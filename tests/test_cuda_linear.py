"""The CUDA kernels of `linear`, in the emulator: every format against the exact product, on odd shapes.

Weights, x and bias end where readable memory ends; y is full of NaN before.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from emulator import kernels
from helpers import ALL_FORMATS, DTYPES, FORMATS, ROUNDING, rounded_weights
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format

every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
BEYOND_ROUNDING = {torch.float32: 7e-5, torch.float16: 2e-4, torch.bfloat16: 2e-4}
"""What a product may add to the rounding of its output. Sums of (zero + code) x lose what the sum of x takes away again:
most where codes are small beside the zero and that sum is large (afq2 with f32: 2e-5 in the root mean square, 2e-4 at most)."""


@cache
def packed_rows(fmt: QuantFormat, k: int) -> Tensor:
    """[16, row_bytes], of rows that differ in size."""
    w = torch.randn(16, k, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-8, 8)[:, None]
    return ops.quantize(w, fmt.name)


def packed_weight(fmt: QuantFormat, n: int, k: int) -> Tensor:
    """Rows in another order every time, so that one in the wrong place shows."""
    order = torch.randint(16, (n,), generator=torch.Generator().manual_seed(n))
    return packed_rows(fmt, k)[order].contiguous()


def run(fmt: QuantFormat, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """[m, n]"""
    (m, k), n = x.shape, packed.shape[0]
    with kernels.Memory() as memory:
        y = memory.new((m, n), x.dtype, "y")
        job = {
            "x": memory.put(x, "x"),
            "weight": memory.put(packed, "weight", align=kernels.facts(fmt.name)["align"]),
            "bias": None if bias is None else memory.put(bias, "bias", align=2),
            "y": y,
            "dtype": x.dtype,
            "m": m,
            "n": n,
            "k": k,
        }
        size = kernels.run("linear_workspace", fmt.name, **job)
        kernels.run("linear", fmt.name, workspace=memory.new((size,), torch.uint8, "workspace"), **job)
        return y.clone()


def product(fmt: QuantFormat, packed: Tensor, x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """What the kernel for m rows of x should give in f64, and by how much it may miss that for the weights' sake.

    For few rows it multiplies the weights as they are; for more, rounded to x's type.
    """
    few = m <= kernels.facts(fmt.name)["few_rows"]
    w, undecided = rounded_weights(packed, fmt, torch.float32 if few else x.dtype)
    return x.double() @ w.t(), x.double().abs() @ undecided.t()


def check(fmt: QuantFormat, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Odd shapes have a bias."""
    packed = packed_weight(fmt, n, k)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if n % 2 else None
    y = run(fmt, x, packed, bias).double()
    assert not y.isnan().any()

    typical = x.double().norm(dim=-1, keepdim=True) * case_norms(fmt, packed) / k**0.5

    def beyond(exact: Tensor) -> Tensor:
        """The error beyond the rounding of y, in units of its own size for every row of w: each must be right by its own."""
        exact = exact if bias is None else exact + bias.double()
        return ((y - exact).abs() - ROUNDING[dtype] * exact.abs()) / typical

    exact, margin = product(fmt, packed, x, m)
    error = float((beyond(exact) - margin / typical).max())
    assert error <= 4 * BEYOND_ROUNDING[dtype], (m, n, k, dtype, error)
    # Against the weights as they are: each has changed by the rounding of its type at most.
    w = rounded_weights(packed, fmt, torch.float32)[0]
    change = 0 * w if m <= kernels.facts(fmt.name)["few_rows"] else ROUNDING[dtype] * w.abs()
    error = float((beyond(x.double() @ w.t()) - x.double().abs() @ change.t() / typical).max())
    assert error <= 4 * BEYOND_ROUNDING[dtype], (m, n, k, dtype, error)


def case_norms(fmt: QuantFormat, packed: Tensor) -> Tensor:
    return rounded_weights(packed, fmt, torch.float32)[0].norm(dim=-1)


def lengths(fmt: QuantFormat) -> list[int]:
    """One block, three blocks, and about 2048 with a chunk that is not whole where there can be one."""
    return [fmt.block, 3 * fmt.block, 2048 // fmt.block * fmt.block + fmt.block]


CASES = [  # tokens, rows, which length
    (1, 1, 2),
    (2, 17, 0),
    (5, 40, 1),
    (8, 17, 1),
    (9, 33, 0),
    (9, 33, 2),
    (17, 7, 1),
    (33, 18, 0),
    (65, 3, 1),
]


@every_variant
def test_odd_shapes(fmt: QuantFormat) -> None:
    """Every kernel of every format."""
    for i, (m, n, length) in enumerate(CASES):
        check(fmt, m, n, lengths(fmt)[length], DTYPES[(i + len(fmt.name)) % 3])


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_shapes(fmt: QuantFormat, dtype: torch.dtype) -> None:
    for m in (1, 2, 5, 8, 9, 17, 33, 63, 64, 65, 129, 321):
        for n in (1, 16, 79):
            for k in lengths(fmt):
                check(fmt, m, n, k, dtype)


@every_format
@pytest.mark.parametrize("limit", [99, 163], ids=lambda kilobytes: f"{kilobytes}KB")
def test_gpus_with_less_shared_memory(fmt: QuantFormat, limit: int) -> None:
    """An RTX 4090's blocks, and an A100's. The kernel for every width of x, with as many chunks as there are warps."""
    with kernels.shared_memory(limit << 10):
        for i, m in enumerate((1, 8, 16, 32, 64, 128)):
            check(fmt, m, 65, 4096, DTYPES[(i + len(fmt.name)) % 3])


def some(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fmt", [get_format(name) for name in names], ids=lambda f: f.name)


@some("q4_0", "q6k", "afq3g32")
@pytest.mark.parametrize("m", [3, 12])
def test_more_chunks_than_warps_hold(fmt: QuantFormat, m: int) -> None:
    check(fmt, m, 5, 34 * 256 + (fmt.block if fmt.block < 256 else 0), torch.bfloat16)


@some("q4_0", "q6k", "fp8", "afq3g32")
@pytest.mark.parametrize(("m", "n", "chunks"), [(63, 40, 12), (64, 8, 3), (129, 200, 11), (12, 1000, 10)])
def test_blocks_split_k(fmt: QuantFormat, m: int, n: int, chunks: int) -> None:
    """Into single chunks; and into parts that their own warps split again, the last of which is smaller."""
    check(fmt, m, n, chunks * 256 + (fmt.block if fmt.block < 256 else 0), torch.float16)


@some("q4_0", "q3k")
@pytest.mark.parametrize("m", [1, 10])
def test_more_rows_than_multiprocessors(fmt: QuantFormat, m: int) -> None:
    """Blocks of 32 rows, and of more than one warp's rows."""
    check(fmt, m, 132 * 32 + 9, 256 + (fmt.block if fmt.block < 256 else 256), torch.float16)


@pytest.mark.slow
@every_format
def test_large(fmt: QuantFormat) -> None:
    for m in (4, 9, 40, 66):
        check(fmt, m, 132 * 32 + 9, 1024, torch.bfloat16)
    for m in (7, 20, 40):
        check(fmt, m, 40, 34 * 256 + fmt.block, torch.float16)


@some("q8_0", "q4k", "afq5g32")
@pytest.mark.parametrize("order", list(kernels.ORDERS))
@pytest.mark.parametrize("late", [True, False], ids=["late", "eager"])
def test_any_schedule(fmt: QuantFormat, order: str, late: bool) -> None:
    with kernels.schedule(order, late_copies=late, seed=3):
        check(fmt, 3, 17, 3 * 256, torch.bfloat16)
        check(fmt, 20, 33, 3 * 256, torch.bfloat16)


@every_format
@pytest.mark.parametrize("m", [3, 12])
def test_each_token_has_its_own_result(fmt: QuantFormat, m: int) -> None:
    """Tokens of very different size, zeros, NaN and infinity: none may leak into another."""
    packed = packed_weight(fmt, 5, fmt.block)
    x = torch.randn(m, fmt.block, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[0] *= 1e20
    x[1] = 0
    x[-1] *= 1e-20
    clean = run(fmt, x, packed)
    assert (clean[1] == 0).all()
    typical = case_norms(fmt, packed) / fmt.block**0.5
    for row in (0, -1):
        exact, margin = (of_rows.squeeze(0) for of_rows in product(fmt, packed, x[[row]], m))
        error = (clean[row].double() - exact).abs() - 2**-8 * exact.abs() - margin
        assert (error <= 1e-3 * typical * x[row].double().norm()).all()
    for bad in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[1, 7] = bad
        y = run(fmt, spoilt, packed)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, *range(2, m)]], clean[[0, *range(2, m)]])


def test_the_same_bits_every_time() -> None:
    fmt = get_format("q4_0")
    packed, x = packed_weight(fmt, 40, 1024), torch.randn(12, 1024)
    for rows in (4, 12):
        first = run(fmt, x[:rows], packed)
        with kernels.schedule("shuffled", seed=9):
            assert torch.equal(run(fmt, x[:rows], packed), first)


def test_nothing_to_do() -> None:
    fmt = get_format("q4_0")
    assert run(fmt, torch.randn(0, 32), packed_weight(fmt, 3, 32)).shape == (0, 3)
    assert run(fmt, torch.randn(4, 32), packed_weight(fmt, 0, 32)).shape == (4, 0)


@some("q4_0", "q4k", "mxfp4", "afq3g32")
def test_tiny(fmt: QuantFormat) -> None:
    """What the sanitizers run."""
    k = fmt.block * max(1, 288 // fmt.block)
    check(fmt, 2, 17, k, torch.bfloat16)
    check(fmt, 10, 17, k, torch.float16)
    check(fmt, 40, 17, k, torch.bfloat16)
    check(fmt, 65, 17, k, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    kernels.sanitized_pytest(variant, "tests/test_cuda_linear.py", "-k", "test_tiny")
