"""Speed of the quantizers, without and with importance, beside ggml's where it is installed.

    OMP_WAIT_POLICY=passive python -m pytest benchmarks/bench_quantize.py -k q4k --benchmark-columns=min,median,rounds

One thread unless "2threads" is in the name; ggml's function has one. Both make the same bytes, or the benchmark fails.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from isqtorch import formats, get_format, ops

from . import workloads
from .conftest import Rates
from .peers import Unavailable, ggml

SHAPE = (256, 4096)
CHECKED = 8  # rows compared with the reference, which is slow


def _cases() -> list[Any]:
    """Who quantizes, on how many threads; the clock as in bench_ops.py."""
    cpu = pytest.mark.benchmark(timer=time.process_time, max_time=0.5)
    wall = pytest.mark.benchmark(timer=time.perf_counter, max_time=0.5)
    return [
        pytest.param("isqtorch", 1, id="isqtorch-1thread", marks=cpu),
        pytest.param("isqtorch", 2, id="isqtorch-2threads", marks=[wall, pytest.mark.slow]),
        pytest.param("ggml", 1, id="ggml-1thread", marks=cpu),
    ]


@pytest.fixture(scope="session")
def peer() -> ggml.Ggml:
    try:
        return ggml.open()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("who", "threads"), _cases())
@pytest.mark.parametrize("important", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("fmt", formats())
def test_quantize(
    benchmark: Any, fmt: str, important: bool, who: str, threads: int, rates: Rates, request: pytest.FixtureRequest
) -> None:
    if important and not get_format(fmt).takes_importance:
        pytest.skip(f"{fmt} takes no importance")
    weight = workloads.weight(*SHAPE)
    vector = workloads.importance(SHAPE[1]) if important else None
    w, v = torch.from_numpy(weight), None if vector is None else torch.from_numpy(vector)
    packed = ops.quantize(w, fmt, v)
    benchmark.group = f"quantize {fmt}{' with importance' * important}"
    if who == "ggml":
        if fmt not in ggml.FORMATS:
            pytest.skip(f"ggml has no {fmt}")
        other: ggml.Ggml = request.getfixturevalue("peer")
        assert np.array_equal(benchmark(other.quantize, fmt, weight, vector), packed.numpy())
    else:
        if get_format(fmt).solver != "hqq":  # hqq stops by the error of the whole matrix
            assert torch.equal(ops.quantize(w[:CHECKED], fmt, v), ops.reference.quantize(w[:CHECKED], fmt, v))
        benchmark(ops.quantize, w, fmt, v)
    rates.record(benchmark, nbytes=packed.nbytes, weights=weight.size)
