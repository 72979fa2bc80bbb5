"""The CPU kernels on arm64, every instruction-set level against the reference; elsewhere in an emulator.

The kernels are plain C++: `tests/neon/driver.cpp` runs them without torch. Here their cases are written to a file, the driver is
built for arm64 and run once per level, and its results are compared. `make test-neon` runs this; it takes a cross compiler
and `qemu-aarch64` on other machines.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import (
    ALL_FORMATS,
    WIDE_FORMATS,
    allowed,
    every_format,
    every_variant,
    int8_activations,
    linear_error,
    same_bits,
    weight,
    wide_activations,
)
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format
from isqtorch.quantizers import has_rule, uses_importance

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "neon"
NATIVE = sys.platform == "linux" and platform.machine() == "aarch64"
COMPILER = ["g++"] if NATIVE else ["aarch64-linux-gnu-g++"]
EMULATOR = [] if NATIVE else ["qemu-aarch64", "-cpu", "max"]
FLAGS = [
    *"-O2 -std=c++17 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi -Werror".split(),
    f"-I{ROOT / 'csrc'}",
]
FLAGS += ["--param", "max-completely-peel-times=8"]  # as in setup.py
LEVELS = ["baseline", "dotprod", "i8mm"]
DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in cpu/kernels.h

MISSING = [tool for tool in [COMPILER[0], *EMULATOR[:1]] if not shutil.which(tool)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"not found: {', '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)"
    ),
]
every_level = pytest.mark.parametrize("level", LEVELS)


# ---- the driver ------------------------------------------------------------------------------------------------------


def _compile(source: Path) -> Path:
    """An object file, kept until any source or header changes."""
    headers = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".inl"})
    digest = hashlib.sha256(" ".join(COMPILER + FLAGS).encode())
    for path in [source, *headers]:
        digest.update(path.read_bytes())
    out = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    if not out.exists():
        for old in BUILD.glob(f"{source.stem}-*.o"):
            old.unlink()
        partial = out.with_suffix(f".{os.getpid()}")
        subprocess.run([*COMPILER, *FLAGS, "-c", str(source), "-o", str(partial)], check=True)
        partial.rename(out)
    return out


@cache
def driver() -> str:
    BUILD.mkdir(parents=True, exist_ok=True)
    cpu = ROOT / "csrc" / "cpu"
    # The largest first, for they are compiled side by side.
    sources = [cpu / "isa" / f"{level}.cpp" for level in LEVELS]
    sources += [cpu / "steps" / "steps_baseline.cpp", cpu / "dispatch.cpp", ROOT / "tests" / "neon" / "driver.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(_compile, sources))
    out = BUILD / "driver"
    subprocess.run([*COMPILER, "-static", *map(str, objects), "-o", str(out)], check=True)
    return str(out)


def test_levels_are_detected() -> None:
    machines = {"cortex-a57": 1, "cortex-a76": 2, "max": 3}
    for machine, count in {"": 3}.items() if NATIVE else machines.items():
        run = subprocess.run(
            [*EMULATOR[:-1], *([] if NATIVE else [machine]), driver()], capture_output=True, text=True, check=True
        )
        found = run.stdout.split()
        assert found == LEVELS[: len(found) if NATIVE else count]


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One call of a kernel: what it gets, and the type and shape of what it returns."""

    operation: str
    format: str
    inputs: list[Tensor]
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int = 0
    k: int = 0
    tokens: int = 0
    rule: int = 0
    weighted: bool = False

    def to_bytes(self) -> bytes:
        source = self.dtype if self.operation == "store" else self.inputs[0].dtype
        header = struct.pack(
            "16s16s6q",
            self.operation.encode(),
            self.format.encode(),
            DTYPE_NUMBERS.get(source, 0),
            self.rule,
            self.rows,
            self.k,
            self.tokens,
            self.weighted,
        )
        return header + b"".join(_raw(tensor) for tensor in self.inputs)

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def decode_case(packed: Tensor, fmt: QuantFormat) -> Case:
    rows, k = packed.shape[0], packed.shape[1] // fmt.block_bytes * fmt.block
    return Case("decode", fmt.name, [packed], torch.float32, (rows, k), rows, k)


RULES = {None: 0, "mlx": 1, "search": 2}  # the numbers of `enum class Rule`


def quantize_case(w: Tensor, fmt: QuantFormat, importance: Tensor | None = None, rule: str | None = None) -> Case:
    rows, k = w.shape
    inputs = [w] if importance is None else [w, importance]
    shape = (rows, k // fmt.block * fmt.block_bytes)
    return Case("quantize", fmt.name, inputs, torch.uint8, shape, rows, k, 0, RULES[rule], importance is not None)


def linear_case(x: Tensor, packed: Tensor, fmt: QuantFormat) -> Case:
    shape = (x.shape[0], packed.shape[0])
    return Case("linear", fmt.name, [packed, x], torch.float32, shape, packed.shape[0], x.shape[1], x.shape[0])


def run(level: str, cases: list[Case], folder: Path) -> list[Tensor]:
    """The results of `cases`, computed by the kernels of `level`."""
    (folder / "cases").write_bytes(b"".join(case.to_bytes() for case in cases))
    if NATIVE and level not in subprocess.run([driver()], capture_output=True, text=True, check=True).stdout.split():
        pytest.skip(f"this machine has no {level}")
    subprocess.run([*EMULATOR, driver(), level, str(folder / "cases"), str(folder / "results")], check=True)
    data = bytearray((folder / "results").read_bytes())
    assert len(data) == sum(case.size for case in cases)
    results, at = [], 0
    for case in cases:
        results.append(
            torch.frombuffer(data, dtype=torch.uint8, offset=at, count=case.size)
            .clone()
            .view(case.dtype)
            .view(case.shape)
        )
        at += case.size
    return results


# ---- decoders and quantizers: the levels above baseline share them ---------------------------------------------------


def hard_weight(fmt: QuantFormat, rows: int, blocks: int) -> Tensor:
    """Normal numbers with zeros, constants, outliers, tiny and one-sided groups among them."""
    w = weight(fmt, rows, blocks, seed=5)
    w[0, : fmt.block] = 0
    w[1, : fmt.block] = w[1, 0]
    w[2, ::7] *= 100
    w[3, : fmt.block] = -w[3, : fmt.block].abs()
    w[4] *= 1e-6
    return w


@cache
def quantized(name: str, dtype: torch.dtype, weighted: bool, rule: str | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights, importance, and what the reference makes of them."""
    fmt = next(f for f in ALL_FORMATS if f.name == name)
    w = hard_weight(fmt, 5, 3).to(dtype)
    importance = weight(fmt, 1, 3, seed=6)[0].abs() if weighted else None
    return w, importance, ops.reference.quantize(w, name, importance, rule)


@every_variant
def test_quantize_equals_the_reference(fmt: QuantFormat, tmp_path: Path) -> None:
    settings = [(dtype, False, None) for dtype in DTYPE_NUMBERS] + [(torch.float32, True, None)] * fmt.takes_importance
    for rule in ("mlx", "search"):
        if has_rule(fmt, rule):
            settings += [(torch.float32, False, rule)] + [(torch.float32, True, rule)] * uses_importance(fmt, rule)
    wanted = [quantized(fmt.name, *setting) for setting in settings]
    cases = [quantize_case(w, fmt, importance, s[2]) for s, (w, importance, _) in zip(settings, wanted, strict=True)]
    for setting, got, (_, _, want) in zip(settings, run("baseline", cases, tmp_path), wanted, strict=True):
        assert torch.equal(got, want), setting


@every_variant
def test_feedback_equals_the_reference(fmt: QuantFormat, tmp_path: Path) -> None:
    w, importance = hard_weight(fmt, 5, 3), weight(fmt, 1, 3, seed=6)[0].abs()
    random = weight(fmt, 3 * fmt.block, 3, seed=7)
    factor = (random / 8).triu(1) + torch.eye(3 * fmt.block) * (random.abs() + 0.1)
    rules = [None, "search"] if has_rule(fmt, "search") else [None]
    cases = [replace(quantize_case(w, fmt, importance, rule), operation="feedback") for rule in rules]
    for case in cases:
        case.inputs.append(factor)
    for rule, got in zip(rules, run("baseline", cases, tmp_path), strict=True):
        assert torch.equal(got, ops.reference.quantize_feedback(w, fmt.name, factor, importance, rule)), rule


@every_variant
def test_decode_equals_the_reference(fmt: QuantFormat, tmp_path: Path) -> None:
    packed = ops.quantize(hard_weight(fmt, 5, 5), fmt.name)
    (got,) = run("baseline", [decode_case(packed, fmt)], tmp_path)
    assert same_bits(got, ops.reference.dequantize(packed, fmt.name, torch.float32))


# ---- linear ----------------------------------------------------------------------------------------------------------


def few_or_many(fmt: QuantFormat, *tokens: int) -> tuple[int, ...]:
    """Numbers of rows of x; fp8 has no product of its own for many."""
    return tokens if fmt.name != "fp8" else tuple(n for n in tokens if n <= 8)


def check_linear(
    fmt: QuantFormat,
    level: str,
    folder: Path,
    cases: list[tuple[Tensor, Tensor]],
    bound: Callable[[Tensor], float],
) -> None:
    results = run(level, [linear_case(x, packed, fmt) for x, packed in cases], folder)
    for y, (x, packed) in zip(results, cases, strict=True):
        assert linear_error(y, x, packed, fmt) <= bound(y), (tuple(x.shape), tuple(packed.shape))


@every_variant
@every_level
def test_linear_is_exact_where_activations_are_int8(fmt: QuantFormat, level: str, tmp_path: Path) -> None:
    """Rounding x to int8 per 32 changes nothing here: any misplaced weight, scale or activation shows."""
    cases = []
    for weights in (512, 1280):  # whole units, behind which there is no memory, and a part of one
        blocks = max(1, weights // fmt.block)
        packed = ops.quantize(weight(fmt, rows=17, blocks=blocks), fmt.name)
        cases += [(int8_activations(tokens, blocks * fmt.block), packed) for tokens in few_or_many(fmt, 1, 2, 4, 7, 33)]
    check_linear(fmt, level, tmp_path, cases, lambda _: 1e-5)


@pytest.mark.parametrize("name", WIDE_FORMATS)
@every_level
def test_8_bit_codes_meet_activations_of_15_bits(name: str, level: str, tmp_path: Path) -> None:
    fmt = get_format(name)
    packed = ops.quantize(weight(fmt, rows=17, blocks=1280 // fmt.block), fmt.name)
    tokens = (1, 2, 4, 7, 8, 33)
    exact = [(wide_activations(count, 1280), packed) for count in tokens]
    check_linear(fmt, level, tmp_path, exact, lambda _: 1e-6)
    check_linear(fmt, level, tmp_path, [(torch.randn(count, 1280), packed) for count in tokens], lambda _: 5e-4)


@every_format
@every_level
def test_linear_of_odd_shapes(fmt: QuantFormat, level: str, tmp_path: Path) -> None:
    cases = []
    for rows in (1, 17):
        for blocks in (1, 3, 1 + 2048 // fmt.block):
            packed = ops.quantize(weight(fmt, rows, blocks), fmt.name)
            cases += [
                (torch.randn(tokens, blocks * fmt.block), packed) for tokens in few_or_many(fmt, 1, 2, 3, 7, 8, 9, 33)
            ]
    check_linear(fmt, level, tmp_path, cases, lambda y: allowed(fmt, y))


@every_format
@every_level
def test_each_row_of_x_has_its_own_result(fmt: QuantFormat, level: str, tmp_path: Path) -> None:
    """Rows of very different size, zeros, NaN and infinity: none may leak into another."""
    packed = ops.quantize(weight(fmt, rows=21, blocks=4), fmt.name)
    cases, bad_values = [], [0.0, float("nan"), float("inf")]
    for tokens in few_or_many(fmt, 3, 20):
        x = torch.randn(tokens, 4 * fmt.block)
        x[0] *= 1e20
        x[1] = 0
        x[-1] *= 1e-20
        for bad in bad_values:
            x[1, 7] = bad
            cases.append(linear_case(x.clone(), packed, fmt))
    results = run(level, cases, tmp_path)
    for i in range(0, len(results), len(bad_values)):
        clean, *spoilt = results[i : i + len(bad_values)]
        assert clean.isfinite().all() and (clean[1] == 0).all()
        others = [0, *range(2, len(clean))]
        for y in spoilt:
            assert not y[1].isfinite().any() and torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(dtype: torch.dtype, tmp_path: Path) -> None:
    halves = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    near = halves.float()[halves.isfinite()]
    floats = torch.cat(
        [near, near * (1 + 2**-9), near * (1 + 2**-12), torch.randn(1001) * 1e-7, torch.tensor([1e30, float("nan")])]
    )
    count = floats.numel()
    loaded, stored = run(
        "baseline",
        [
            Case("load", "", [halves], torch.float32, (65536,), k=65536),
            Case("store", "", [floats], dtype, (count,), k=count),
        ],
        tmp_path,
    )
    assert torch.equal(loaded.isnan(), halves.isnan()) and same_bits(
        loaded[~loaded.isnan()], halves.float()[~halves.isnan()]
    )
    assert torch.equal(stored.isnan(), floats.isnan())
    assert torch.equal(stored[:-1].view(torch.int16), floats[:-1].to(dtype).view(torch.int16))
