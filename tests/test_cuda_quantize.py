"""Quantizing on a GPU, in the emulator: the CPU's bytes for every format, and the CPU's faults."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from emulator import kernels
from helpers import ALL_FORMATS, DTYPES, FORMATS, golden, weight
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format
from isqtorch.quantizers import has_rule
from isqtorch.tensor import QuantizedTensor

HERE = Path(__file__).resolve()
NONE = 2**63 - 1
RULES = {None: 0, "mlx": 1, "search": 2}  # the numbers of `enum class Rule`
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
AFFINE = [fmt for fmt in ALL_FORMATS if fmt.solver == "affine"]
HQQ = [fmt for fmt in ALL_FORMATS if fmt.solver == "hqq"]
SEARCHED = [fmt for fmt in ALL_FORMATS if has_rule(fmt, "search")]


@dataclass
class Result:
    """What the kernel left: bytes, and the flat index of the first weight of either fault."""

    packed: Tensor
    bad_weight: int
    overflow: int


def run(w: Tensor, fmt: QuantFormat, importance: Tensor | None = None, rule: str | None = None, off: int = 0) -> Result:
    """Through the kernel, from and to memory that ends with its contents.

    Args:
        off: elements of the inputs and bytes of the output, in units of what it must align to, by which they miss an
            address that is a multiple of 16.
    """
    rows, k = w.shape
    memory = kernels.Memory()

    def put(t: Tensor, name: str) -> Tensor:
        place = memory.new((off + t.numel(),), t.dtype, name)
        place[off:] = t.reshape(-1)
        return place[off:]

    skip, size = off * kernels.facts(fmt.name)["align"], rows * fmt.row_bytes(k)
    out, faults = memory.new((skip + size,), torch.uint8, "out"), memory.put(torch.full((2,), NONE), "faults")
    job = {"w": put(w, "w"), "dtype": w.dtype, "rows": rows, "k": k, "rule": RULES[rule]}
    job |= {"out": out[skip:], "faults": faults}
    if importance is not None:
        job["importance"] = put(importance, "importance")
    workspace = kernels.run("quantize_workspace", fmt.name, **job)
    job["workspace"] = memory.new((workspace,), torch.uint8, "workspace")
    kernels.run("quantize", fmt.name, **job)
    assert bool((out[:skip] == 0xFF).all()), "wrote in front of the output"
    return Result(out[skip:].clone().view(rows, -1), *faults.tolist())


def outcome_of_kernel(w: Tensor, fmt: QuantFormat, importance: Tensor | None, rule: str | None) -> str | Tensor:
    """Bytes, or what an operator would complain about: a weight, or the first of a block."""
    got = run(w, fmt, importance, rule)
    if got.bad_weight != NONE:
        return f"bad weight {got.bad_weight}"
    return got.packed if got.overflow == NONE else f"overflow at {got.overflow}"


def outcome_on_cpu(w: Tensor, fmt: QuantFormat, importance: Tensor | None, rule: str | None) -> str | Tensor:
    try:
        return ops.quantize(w, fmt.name, importance, rule)
    except ValueError as error:
        row, column = map(int, re.search(r"weight\[(\d+), (\d+)\]", str(error)).groups())  # type: ignore[union-attr]
        kind = "overflow at" if "too large for its 16-bit scale" in str(error) else "bad weight"
        return f"{kind} {row * w.shape[1] + column}"


def check(w: Tensor, fmt: QuantFormat, importance: Tensor | None = None, rule: str | None = None) -> None:
    """Kernel and CPU must agree, in bytes or in what they refuse."""
    got, want = outcome_of_kernel(w, fmt, importance, rule), outcome_on_cpu(w, fmt, importance, rule)
    if isinstance(got, str) or isinstance(want, str):
        assert isinstance(got, str) and got == want, (got, want)
    else:
        different = (got != want).nonzero()
        assert not len(different), (
            f"{len(different)} of {want.numel()} bytes, first (row, byte) {different[0].tolist()}"
        )


def rules_of(fmt: QuantFormat) -> list[str | None]:
    return [rule for rule in RULES if has_rule(fmt, rule)]


def check_all(w: Tensor, fmt: QuantFormat) -> None:
    """Without and with importance, and by every rule."""
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) ** 3
    importance[:16] = 0
    importance[fmt.block : 2 * fmt.block - 1] = 0  # a block with a single column that counts,
    importance[2 * fmt.block : 3 * fmt.block] = 0  # and one without any
    for rule in rules_of(fmt):
        check(w, fmt, None, rule)
        check(w, fmt, importance, rule)


@cache
def uneven(block: int) -> Tensor:
    """Rows of every kind, all small enough for 16-bit scales, of f16, too; 3 blocks wide."""
    w = torch.randn(14, 3 * block, generator=torch.Generator().manual_seed(0)) * 0.03
    w[1, ::17] *= 50
    w[2] = 0
    w[3] = -w[3].abs()
    w[4] = w[4].abs() + 1
    w[5] *= 2e-7  # subnormal f16
    w[6] *= 1e3
    w[7] = 0.25  # constant
    w[8] = (w[8] * 100).round() / 8  # many ties
    w[9, : block + 5] = 0
    w[10] = w[10].sign() * 0.5
    w[11] = (w[11] * 90).exp()  # from 1e-4 to 1e4
    w[12] *= torch.randint(0, 2, w[12].shape, generator=torch.Generator().manual_seed(1))  # zeros of both signs
    return w


@every_variant
@every_dtype
def test_the_bytes_are_the_cpus(fmt: QuantFormat, dtype: torch.dtype) -> None:
    check_all(uneven(fmt.block).to(dtype), fmt)


@every_format
def test_rows_and_tiles_of_any_number(fmt: QuantFormat) -> None:
    """A single block; tiles that end anywhere; more rows and columns than a tile of the mean squares has."""
    for rows, blocks in [(1, 1), (3, 7), (35, 1 + 288 // fmt.block)]:
        check_all(weight(fmt, rows, blocks).half() * 0.1, fmt)


@every_variant
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-8, 1e4, 1e8, 1e15, 1e19, 1e30, 8e37])
def test_extreme_weights_give_the_cpus_bytes_or_refusal(fmt: QuantFormat, scale: float) -> None:
    w = weight(fmt, rows=3, blocks=3) * scale
    w[1, : fmt.block] = 0
    check_all(w, fmt)


@cache
def magnitudes_far_apart() -> Tensor:
    """Weights of all magnitudes, and of signs and patterns that make searches go wrong."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (60, 1024), generator=generator).to(torch.int32) & ~(1 << 30)
    return bits.view(torch.float32) * torch.where(torch.rand(bits.shape, generator=generator) < 0.5, 2.0**9, 1.0)


@every_format
def test_magnitudes_far_apart(fmt: QuantFormat) -> None:
    check_all(magnitudes_far_apart().bfloat16(), fmt)


@every_format
@every_dtype
def test_nothing_need_align(fmt: QuantFormat, dtype: torch.dtype) -> None:
    w, importance = weight(fmt, 3, 3).to(dtype), torch.rand(3 * fmt.block)
    for off in (1, 3):
        for rule in rules_of(fmt):
            for given in (None, importance):
                assert torch.equal(run(w, fmt, given, rule, off).packed, ops.quantize(w, fmt.name, given, rule))


def test_no_rows() -> None:
    with kernels.Memory() as memory:
        faults = memory.put(torch.full((2,), NONE), "faults")
        for fmt in FORMATS:
            for rule in rules_of(fmt):
                kernels.run("quantize", fmt.name, rows=0, k=fmt.block, rule=RULES[rule], faults=faults)


# ---- faults ----------------------------------------------------------------------------------------------------------


@every_format
@every_dtype
def test_the_first_bad_weight_is_reported(fmt: QuantFormat, dtype: torch.dtype) -> None:
    w = weight(fmt, 5, 8192 // fmt.block).to(dtype)  # ten tiles
    for first in (5 * 8192 - 1, 3 * 8192 + 4321, 8192 + 33, 8192 + 17, 7):
        for value in (float("nan"), float("-inf")):
            w.view(-1)[first] = value
            for rule in rules_of(fmt):
                got = run(w, fmt, None, rule)
                assert got.bad_weight == first
                assert got.overflow == NONE or got.overflow >= first // fmt.block * fmt.block


@every_variant
def test_the_first_block_that_overflows_is_reported(fmt: QuantFormat) -> None:
    largest = 3e38 if fmt.solver == "affine" and not fmt.name.endswith("f16") else 1e10
    w = weight(fmt, 5, 8192 // fmt.block)
    for first in (5 * 8192 - 1, 3 * 8192 + 4321, 8192 + 33):
        w.view(-1)[first], w.view(-1)[first // fmt.block * fmt.block] = largest, -largest
        overflows = any(part.dtype in (torch.float16, torch.bfloat16) for part in fmt.parts)
        for rule in rules_of(fmt):
            got = run(w, fmt, None, rule)
            assert got.bad_weight == NONE
            assert got.overflow == (first // fmt.block * fmt.block if overflows else NONE)
            check(w, fmt, None, rule)


# ---- goldens ---------------------------------------------------------------------------------------------------------

GGML = golden("ggml_public")
SETS: dict[str, list[tuple[str, str]]] = defaultdict(list)  # type -> (case, variant)
for _key in GGML:
    if _key.startswith("q/"):
        _, _type, _case, _variant = _key.split("/")
        SETS[_type].append((_case, _variant))


@pytest.mark.parametrize("kind", SETS)
def test_golden_ggml(kind: str) -> None:
    fmt, wrong = get_format(kind), []
    for case, variant in SETS[kind]:
        w, want = GGML[f"x/{case}"], GGML[f"q/{kind}/{case}/{variant}"]
        if variant == "none":
            got = run(w, fmt).packed
        else:
            vectors = GGML[f"imx/{case}/{variant}"]
            rows = [(w, vectors)] if vectors.dim() == 1 else zip(w.split(1), vectors, strict=True)
            got = torch.cat([run(row, fmt, importance).packed for row, importance in rows])
        if not torch.equal(got, want):
            wrong.append(f"{case}/{variant}")
    assert not wrong


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_golden_afq(dtype: str) -> None:
    data = golden("affine")
    w = data[f"afq/{dtype}/W"]
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            fmt = get_format(f"afq{bits}g{group}.{dtype}")
            packed = QuantizedTensor(run(w, fmt, None, "mlx").packed, fmt, w.shape, w.dtype)
            names = ("wq", "scales", "biases")
            for got, name in zip(packed.to_mlx(), names, strict=True):
                want = data[f"afq/{dtype}/b{bits}_g{group}/{name}"]
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (fmt.name, name)


# ---- hqq -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", HQQ, ids=lambda f: f.name)
@pytest.mark.parametrize("scale", [0.02, 5.0, 300.0])
def test_hqq_with_errors_that_shrink(fmt: QuantFormat, scale: float) -> None:
    """Large weights, so that the p-norm has something to weigh; many groups, so that sums have parts."""
    check(weight(fmt, 33, 33) * scale, fmt)


@pytest.mark.parametrize("fmt", HQQ, ids=lambda f: f.name)
@pytest.mark.parametrize("rule", [None, "search"])
def test_hqq_groups_finer_than_the_steps_of_the_solver(fmt: QuantFormat, rule: str | None) -> None:
    sizes = torch.logspace(-9, -1, 17)[:, None] * torch.where(torch.arange(17) % 2 == 0, 1, -1)[:, None]
    for w in (weight(fmt, 17, 3) * sizes, sizes + weight(fmt, 17, 3) * 1e-5):
        check(w, fmt, None, rule)


@pytest.mark.slow
def test_hqq_with_more_parts_than_a_chunk() -> None:
    fmt = get_format("hqq4g32")
    check(weight(fmt, 33 * 16, 2048 // 32 * 32 // 32 + 1) * 3, fmt)


# ---- search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", SEARCHED, ids=lambda f: f.name)
def test_the_first_of_equally_good_lines_is_taken(fmt: QuantFormat) -> None:
    """Pairs of x and -x: the mirror image of a line costs the same, and another thread finds it."""
    half = torch.randn(30, 3 * fmt.block // 2, generator=torch.Generator().manual_seed(2))
    check(torch.stack([half, -half], dim=2).flatten(1), fmt, None, "search")


# ---- schedules and sanitizers ----------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_order_does_not_matter(fmt: QuantFormat, order: str) -> None:
    with kernels.schedule(order):
        check_all(weight(fmt, 5, 1 + 1056 // fmt.block), fmt)


SANITIZED = "test_nothing_need_align and bfloat16"


@pytest.mark.slow
@pytest.mark.skipif(kernels.VARIANT != "plain", reason="runs these tests under a sanitizer")
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_have_nothing_to_say(variant: str) -> None:
    kernels.sanitized_pytest(variant, str(HERE), "-k", SANITIZED)
