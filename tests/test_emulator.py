"""The emulator that GPU kernels are tested in: right kernels come out right, and every planted fault is reported."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build, selftest

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "emulator" / "selftest.cu"
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
both_copies = pytest.mark.parametrize("late", [True, False], ids=["late", "eager"])


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.library("selftest", [SOURCE])))


def numbers(count: int) -> list[float]:
    """What selftest.cu puts into x."""
    return [((i * 7 % 31) - 15) / 4 for i in range(count)]


def product() -> list[float]:
    x = numbers(384)
    return [
        sum(x[16 * row + k] * x[256 + 16 * column + k] for k in range(16)) for row in range(16) for column in range(8)
    ]


X = numbers(768)
EXPECTED = {
    "block_sum": [sum(X[256 * block : 256 * block + 256]) for block in range(3)],
    "reverse_twice": [value + 1 for value in X[:64]],
    "warp_sum": [sum(X[:32])] * 32,
    "neighbour": [X[(i + 1) % 32] + X[(i + 31) % 32] for i in range(32)],
    "copy_through": X[127::-1],
    "small_product": product(),
}
FAULTS = {
    "diverge": "warp divergence: two different functions, or masks, meet: block (0, 0, 0), thread (",
    "leave_before_barrier": "threads of its block wait at a block barrier|a block barrier after 32 threads of the block have ended",
    "wait_apart": "deadlock: 1 threads wait at a warp barrier, 63 threads wait at a block barrier, and 0 have ended",
    "past_the_end": "stray access to byte 128 of 'x' (128 bytes)",
    "overflow_stack": "a thread's stack overflows",
    "masked_out": "calls a warp function whose mask leaves it out",
}
RACES = [
    "block_sum without barrier",
    "reverse_twice without barrier",
    "neighbour without barrier",
    "copy_through without barrier",
]


@every_order
@both_copies
@pytest.mark.parametrize("case", EXPECTED)
def test_right_kernels(library: ctypes.CDLL, case: str, order: int, late: bool) -> None:
    error, out = selftest.run(library, case, order, late)
    assert error == ""
    assert out[: len(EXPECTED[case])] == EXPECTED[case]


@every_order
@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_reported(library: ctypes.CDLL, case: str, order: int) -> None:
    error, _ = selftest.run(library, case, order)
    assert any(part in error for part in FAULTS[case].split("|")), error
    assert re.search(r"block \(0, 0, 0\), thread \(\d+, 0, 0\)$", error)
    assert selftest.run(library, "warp_sum", order) == ("", EXPECTED["warp_sum"] + [0.0] * (selftest.LARGEST - 32))


def test_a_stray_access_names_its_source_line(library: ctypes.CDLL) -> None:
    error, _ = selftest.run(library, "past_the_end")
    path, offset = re.search(r"\[(.*)\+(0x[0-9a-f]+)\]", error).groups()  # type: ignore[union-attr]
    line = subprocess.run(["addr2line", "-e", path, offset], capture_output=True, text=True, check=True).stdout
    assert "selftest.cu:" in line
    assert "past_the_end" in SOURCE.read_text().splitlines()[int(line.split(":")[1].split()[0]) - 1]


@pytest.mark.parametrize("case", [*RACES, "copy_through without wait"])
def test_a_missing_barrier_shows_in_some_order(library: ctypes.CDLL, case: str) -> None:
    right = EXPECTED[case.split(" without")[0]]
    outputs = [selftest.run(library, case, order)[1][: len(right)] for order in ORDERS.values()]
    assert any(out != right for out in outputs)


def test_a_missing_wait_shows_only_with_late_copies(library: ctypes.CDLL) -> None:
    right = EXPECTED["copy_through"]
    assert selftest.run(library, "copy_through without wait", late=False)[1][:128] == right
    assert selftest.run(library, "copy_through without wait", late=True)[1][:128] != right


def sanitized(variant: str, cases: list[str], order: int = 0) -> subprocess.CompletedProcess[str]:
    path = build.library("selftest", [SOURCE], variant)
    script = [sys.executable, str(HERE / "emulator" / "selftest.py"), str(path), str(order), "0", *cases]
    command, environment = build.sanitized(variant, script)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@every_order
def test_address_sanitizer_has_nothing_to_say_of_right_kernels(order: int) -> None:
    done = sanitized("asan", [*EXPECTED, *FAULTS, *EXPECTED], order)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert all(results[case][0] == "" for case in EXPECTED)
    assert all(results[case][0] for case in FAULTS)


needs_setarch = pytest.mark.skipif(not shutil.which("setarch"), reason="setarch (util-linux) is missing")


@needs_setarch
@every_order
def test_thread_sanitizer_has_nothing_to_say_of_right_kernels(order: int) -> None:
    done = sanitized("tsan", list(EXPECTED), order)
    assert done.returncode == 0, done.stderr


@needs_setarch
@pytest.mark.parametrize("case", RACES)
def test_thread_sanitizer_finds_the_race(case: str) -> None:
    done = sanitized("tsan", [case])
    assert done.returncode == 66
    assert "data race" in done.stderr and "selftest.cu" in done.stderr
