"""Speed of the quantizers, without and with importance, by default and with rule="search", beside ggml's where it is installed.

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
from isqtorch.quantizers import has_rule, uses_importance

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
@pytest.mark.parametrize("rule", [None, "search"], ids=["default", "search"])
@pytest.mark.parametrize("fmt", formats())
def test_quantize(
    benchmark: Any,
    fmt: str,
    rule: str | None,
    important: bool,
    who: str,
    threads: int,
    rates: Rates,
    request: pytest.FixtureRequest,
) -> None:
    if not has_rule(get_format(fmt), rule):
        pytest.skip(f"{fmt} has no rule {rule!r}")
    if important and not uses_importance(get_format(fmt), rule):
        pytest.skip(f"{fmt} takes no importance")
    weight = workloads.weight(*SHAPE)
    vector = workloads.importance(SHAPE[1]) if important else None
    w, v = torch.from_numpy(weight), None if vector is None else torch.from_numpy(vector)
    packed = ops.quantize(w, fmt, v, rule)
    benchmark.group = f"quantize {fmt}{' search' * (rule is not None)}{' with importance' * important}"
    if who == "ggml":
        if fmt not in ggml.FORMATS or rule is not None:
            pytest.skip(f"ggml has no {fmt} with this rule")
        other: ggml.Ggml = request.getfixturevalue("peer")
        assert np.array_equal(benchmark(other.quantize, fmt, weight, vector), packed.numpy())
    else:
        if get_format(fmt).solver != "hqq":  # hqq stops by the error of the whole matrix
            few = w[:CHECKED]
            assert torch.equal(ops.quantize(few, fmt, v, rule), ops.reference.quantize(few, fmt, v, rule))
        benchmark(ops.quantize, w, fmt, v, rule)
    rates.record(benchmark, nbytes=packed.nbytes, weights=weight.size)
