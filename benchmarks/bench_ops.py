"""Speed of the operators on one core, every format, after a check that they compute the right thing.

    OMP_WAIT_POLICY=passive python -m pytest benchmarks -k "q4k or bf16" --benchmark-columns=min,median,rounds

CPU time of the calling thread is measured, not wall time, so that other work on the machine hardly shows. One matrix of 2048 x 2048
stays in the cache: this compares kernels, not memories. Rates are in `extra_info`, which `--benchmark-json=FILE` keeps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from isqtorch import formats, get_format, ops

N = K = 2048
ROWS_OF_X = [1, 8, 64]

on_thread = pytest.mark.benchmark(timer=time.thread_time, min_rounds=7, warmup=True)
every_format = pytest.mark.parametrize("fmt", formats())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02


def record(benchmark, weights: int) -> None:
    """Billions of weights per second, from the best round."""
    benchmark.extra_info["gweights_per_s"] = weights / benchmark.stats.stats.min / 1e9


@on_thread
@every_format
def test_quantize(benchmark, fmt: str, weight: Tensor) -> None:
    assert torch.equal(ops.quantize(weight[:4], fmt), ops.reference.quantize(weight[:4], fmt))
    benchmark.group = "quantize f32"
    benchmark(ops.quantize, weight, fmt)
    record(benchmark, N * K)


@on_thread
@every_format
def test_dequantize(benchmark, fmt: str, weight: Tensor) -> None:
    packed = ops.quantize(weight, fmt)
    want = ops.reference.dequantize(packed[:4], fmt, torch.bfloat16)
    assert torch.equal(ops.dequantize(packed[:4], fmt, torch.bfloat16), want)
    benchmark.group = "dequantize to bf16"
    benchmark(ops.dequantize, packed, fmt, torch.bfloat16)
    record(benchmark, N * K)


@on_thread
@pytest.mark.parametrize("rows", ROWS_OF_X, ids=lambda rows: f"M{rows}")
@pytest.mark.parametrize("fmt", ["bf16", *formats()])
def test_linear(benchmark, fmt: str, rows: int, weight: Tensor) -> None:
    """x in bf16; "bf16" is torch's own F.linear."""
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    benchmark.group = f"linear, {rows} rows of x"
    if fmt == "bf16":
        benchmark(torch.nn.functional.linear, x, weight.bfloat16())
    else:
        packed = ops.quantize(weight, fmt)
        exact = x.double() @ ops.dequantize(packed, fmt, torch.float32).double().t()
        error = (ops.linear(x, packed, fmt).double() - exact).norm() / exact.norm()
        assert error < get_format(fmt).linear_error + 2**-8  # and the rounding of a bf16 result
        benchmark(ops.linear, x, packed, fmt)
    record(benchmark, N * K)
