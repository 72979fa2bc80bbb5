"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from helpers import ...`

from helpers import FORMATS, IMPLEMENTATIONS, implementation, run_flushing_denormals

from isqtorch import ops
from isqtorch.formats import QuantFormat
from isqtorch.ops.native import LIBRARY, NATIVE_DEVICES, NO_CUDA


def pytest_configure() -> None:
    """`make sanitize` must not test the ordinary library."""
    assert os.environ.get("ISQTORCH_SANITIZE") != "1" or "sanitize" in LIBRARY.parts, LIBRARY


def pytest_report_header() -> str:
    return f"isqtorch: {LIBRARY}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `cuda` need a GPU and the kernels for it."""
    if item.get_closest_marker("cuda") and not ("cuda" in NATIVE_DEVICES and torch.cuda.is_available()):
        pytest.skip(f"no GPU with CUDA kernels: {NO_CUDA or 'torch sees no GPU'}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run and order."""
    torch.manual_seed(0)


@pytest.fixture(params=FORMATS, ids=lambda fmt: fmt.name)
def fmt(request: pytest.FixtureRequest) -> QuantFormat:
    """Every format, without the variants."""
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> Iterator[object]:
    """The ops: the reference, and native on every instruction-set level that this machine can run."""
    name, _, isa = request.param.partition("-")
    if isa:
        ops.set_cpu_isa(isa)
    yield implementation(name)
    ops.set_cpu_isa("")


@pytest.fixture(params=["ieee", "flush_denormal"])
def float_mode(request: pytest.FixtureRequest) -> Callable[[Callable[[], None]], None]:
    """A function that runs a function, with subnormal numbers intact or flushed to zero."""
    return (lambda work: work()) if request.param == "ieee" else run_flushing_denormals
