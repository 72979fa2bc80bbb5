"""Speed of linear, dequantize and embedding, every format, after a check that they compute the right thing.

    OMP_WAIT_POLICY=passive python -m pytest benchmarks/bench_ops.py -k "q4k or bf16" --benchmark-columns=min,median,rounds
    ... -m "slow or not slow"        all numbers of rows, shapes, and two threads
    ... -k "linear and dram"
    python -m benchmarks.bench_ops --device cuda    the CUDA kernels: benchmarks/cuda/report.py, which has more options
    python -m benchmarks.bench_ops --device mps     the Metal kernels: benchmarks/metal.py

On one thread the clock is the CPU time of the process, so that other work on the machine hardly shows; on two it is wall time.
"hot" multiplies with one matrix again and again, "dram" with copies that rotate through memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from isqtorch import formats, ops

from . import workloads
from .conftest import Rates
from .ours import check_linear, linear_call, rotation

slow = pytest.mark.slow
every_format = pytest.mark.parametrize("fmt", formats())
on_threads = pytest.mark.parametrize(
    "threads",
    [
        pytest.param(1, id="1thread", marks=pytest.mark.benchmark(timer=time.process_time, max_time=0.5, warmup=True)),
        pytest.param(
            2, id="2threads", marks=[slow, pytest.mark.benchmark(timer=time.perf_counter, max_time=0.5, warmup=True)]
        ),
    ],
)
TORCH = {"bf16": torch.bfloat16, "f32": torch.float32}
USUAL_ROWS, USUAL_SHAPE = (1, 8, 128), (4096, 4096)
FEW = 8  # rows up to which it matters where the weight comes from


def _linear_cases() -> list[Any]:
    """(N, K), M and regime; what is not usual is marked slow."""
    cases = []
    for n, k in workloads.SHAPES:
        for m in workloads.ROWS:
            for regime in ("hot", "dram") if m <= FEW else ("hot",):
                usual = (n, k) == USUAL_SHAPE and m in USUAL_ROWS and (regime == "hot" or m == 1)
                cases.append(pytest.param((n, k), m, regime, id=f"{n}x{k}-M{m}-{regime}", marks=() if usual else slow))
    return cases


@lru_cache(maxsize=1)
def weight(shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(workloads.weight(*shape))


@lru_cache(maxsize=2)
def packed_weight(shape: tuple[int, int], fmt: str) -> Tensor:
    return ops.quantize(weight(shape), fmt) if fmt not in TORCH else weight(shape).to(TORCH[fmt])


@on_threads
@pytest.mark.parametrize("fmt", [*TORCH, *formats()])
@pytest.mark.parametrize(("shape", "m", "regime"), _linear_cases())
def test_linear(
    benchmark: Any, fmt: str, shape: tuple[int, int], m: int, regime: str, threads: int, arena: Tensor, rates: Rates
) -> None:
    """x in bf16; "bf16" and "f32" are torch's own F.linear."""
    packed = packed_weight(shape, fmt)
    x = torch.from_numpy(workloads.activations(m, shape[1])).to(TORCH.get(fmt, torch.bfloat16))
    copies = [packed]
    if regime == "dram":
        copies = [copy.view(packed.dtype) for copy in rotation(packed.view(torch.uint8), arena)]
    benchmark.group = f"linear {shape[0]}x{shape[1]} M={m} {regime}, {threads} thread{'s' * (threads > 1)}"
    if fmt in TORCH:
        benchmark(_torch_call(x, copies))
    else:
        check_linear(x, packed, fmt)
        benchmark(linear_call(x, copies, fmt))
    rates.record(benchmark, nbytes=packed.nbytes, flop=2 * m * weight(shape).numel())


def _torch_call(x: Tensor, copies: list[Tensor]) -> Any:
    turn = 0

    def call() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(copies)
        return torch_linear(x, copies[turn])

    return call


@on_threads
@every_format
def test_dequantize(benchmark: Any, fmt: str, threads: int, rates: Rates) -> None:
    packed = packed_weight(USUAL_SHAPE, fmt)
    want = ops.reference.dequantize(packed[:4], fmt, torch.bfloat16)
    assert torch.equal(ops.dequantize(packed[:4], fmt, torch.bfloat16), want)
    benchmark.group = f"dequantize to bf16, {threads} thread{'s' * (threads > 1)}"
    benchmark(ops.dequantize, packed, fmt, torch.bfloat16)
    rates.record(benchmark, nbytes=packed.nbytes, weights=weight(USUAL_SHAPE).numel())


@on_threads
@every_format
@pytest.mark.parametrize("count", [pytest.param(1, marks=slow), 512], ids=lambda count: f"{count}ids")
def test_embedding(benchmark: Any, fmt: str, count: int, threads: int, rates: Rates) -> None:
    packed = packed_weight(USUAL_SHAPE, fmt)
    ids = torch.randint(len(packed), (count,), generator=torch.Generator().manual_seed(0))
    want = ops.reference.embedding(ids[:4], packed, fmt, torch.bfloat16)
    assert torch.equal(ops.embedding(ids[:4], packed, fmt, torch.bfloat16), want)
    benchmark.group = f"embedding of {count} ids, {threads} thread{'s' * (threads > 1)}"
    benchmark(ops.embedding, ids, packed, fmt, torch.bfloat16)
    rates.record(benchmark, nbytes=count * packed[0].nbytes, weights=count * USUAL_SHAPE[1])


def main(arguments: list[str]) -> int:
    """This file's benchmarks, or those of a GPU's kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    args, rest = parser.parse_known_args(arguments)
    if args.device == "cuda":
        from .cuda.report import main as measure_cuda

        return measure_cuda(rest)
    if args.device == "mps":
        from .metal import main as measure_metal

        return measure_metal(rest)
    return int(pytest.main([__file__, *rest]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
