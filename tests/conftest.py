"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from helpers import ...`

from helpers import FORMATS, GPU_ORDERS, IMPLEMENTATIONS, implementation, run_flushing_denormals

from isqtorch import ops
from isqtorch.formats import QuantFormat
from isqtorch.ops.native import LIBRARY, NATIVE_DEVICES, NO_CUDA


def pytest_configure() -> None:
    """`make sanitize` must not test the ordinary library; Ctrl-C is tested also where tests run in the background."""
    # Shells start background jobs with SIGINT ignored, which every process that a test starts would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


@pytest.fixture(params=ops.cpu_info().isa_supported)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction-set level that this machine can run, in force."""
    yield from _on(request.param)


@pytest.fixture(params=ops.cpu_info().isa_with_formats)
def format_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The levels that have quantizers and decoders of their own; the others use those of the level below."""
    yield from _on(request.param)


def _on(level: str) -> Iterator[str]:
    ops.set_cpu_isa(level)
    yield level
    ops.set_cpu_isa("")


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Fills what torch.empty returns with NaN or large integers, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes a file whose name tells nothing: the content must."""

    def write(data: bytes) -> Path:
        path = tmp_path / "file"
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(params=GPU_ORDERS)
def metal_order(request: pytest.FixtureRequest) -> Iterator[str]:
    """The orders in which the emulator of Metal gives threads their turns, in force."""
    from emulator.metal import runner

    with runner.schedule(request.param, seed=7):
        yield request.param


@pytest.fixture(params=["ieee", "flush_denormal"])
def float_mode(request: pytest.FixtureRequest) -> Callable[[Callable[[], None]], None]:
    """A function that runs a function, with subnormal numbers intact or flushed to zero."""
    return (lambda work: work()) if request.param == "ieee" else run_flushing_denormals
