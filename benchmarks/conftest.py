"""Fixtures of the bench_*.py files, and the table of rates that pytest-benchmark's own does not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from isqtorch.text import text_table

from . import workloads
from .bandwidth import Bandwidth
from .timing import interleave

_HEADERS = ("group", "name", "median ms", "min ms", "GB/s", "% of read", "GFLOPS", "Mweights/s")
_rows: list[list[str]] = []


class Rates:
    """Turns a finished benchmark into rates."""

    def __init__(self, bandwidth: Bandwidth, threads: int) -> None:
        stream = bandwidth.stream(threads=threads)
        self._read = stream.nbytes / interleave({0: stream}, rounds=9, seconds=0)[0].median(threads)  # bytes/s

    def record(self, benchmark: Any, *, nbytes: int, flop: float = 0, weights: int = 0) -> None:
        """Put the rates of the median into `extra_info`, which `--benchmark-json` keeps, and into the table."""
        stats = benchmark.stats.stats
        rate = nbytes / stats.median
        info = {"gb_per_s": rate / 1e9, "percent_of_read": 100 * rate / self._read}
        info |= {"gflops": flop / stats.median / 1e9, "mweights_per_s": weights / stats.median / 1e6}
        benchmark.extra_info.update(info)
        cells = [f"{value:.1f}" if value else "-" for value in info.values()]
        _rows.append([benchmark.group, benchmark.name, f"{1e3 * stats.median:.4g}", f"{1e3 * stats.min:.4g}", *cells])


@pytest.fixture(scope="session")
def bandwidth() -> Bandwidth:
    return Bandwidth(torch.ones(workloads.DRAM_BYTES, dtype=torch.uint8))


@pytest.fixture(scope="session")
def rates_by_threads() -> dict[int, Rates]:
    return {}


@pytest.fixture
def rates(threads: int, bandwidth: Bandwidth, rates_by_threads: dict[int, Rates]) -> Rates:
    """For the number of threads that the benchmark runs with."""
    if threads not in rates_by_threads:
        rates_by_threads[threads] = Rates(bandwidth, threads)
    torch.set_num_threads(threads)
    return rates_by_threads[threads]


@pytest.fixture(scope="session")
def arena() -> Tensor:
    """Room for copies of a weight that together exceed any cache."""
    return torch.empty(workloads.DRAM_BYTES + (1 << 28), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _rows:
        terminalreporter.section("rates")
        terminalreporter.write_line(text_table(_HEADERS, _rows, right=range(2, len(_HEADERS))))
        _rows.clear()
