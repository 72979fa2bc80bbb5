"""The Metal kernels of every format, in the emulator and, with `-m mps`, on a Mac: one suite, the same host functions."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from emulator.metal import compiler, races, runner
from helpers import ALL_FORMATS, DTYPES, FORMATS, ROUNDING, LinearCase, every_dtype, every_format, golden, weight
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format
from isqtorch.ops import reference
from isqtorch.ops.metal import chips, library
from isqtorch.ops.metal import ops as metal
from isqtorch.ops.metal.formats import struct_of

OTHERS = [fmt for fmt in ALL_FORMATS if fmt not in FORMATS]
ON_GPU = [fmt for fmt in ALL_FORMATS if struct_of(fmt.name).quantizes]
ROWS = (1, 7, 32, 33, 256)
SEEN = 1e-3  # of an output: what sums in another order, and weights in f16 tiles, may add to its rounding


needs_clang = pytest.mark.skipif(
    compiler.compiler_command() is None,
    reason="Metal shaders are not tested: no clang++ >= 19 (Debian's clang-19, PyPI's ziglang, or ISQTORCH_CLANG)",
)


@pytest.fixture(
    scope="module", params=[pytest.param("emulator", marks=needs_clang), pytest.param("mps", marks=pytest.mark.mps)]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the tensors lie: on the CPU, for the emulator, or on a Mac's GPU."""
    if request.param == "mps":
        yield "mps"
        return
    with runner.emulated():
        with ThreadPoolExecutor(2) as pool:  # compilers are processes of their own
            pairs = [(fmt.name, dtype) for fmt in FORMATS for dtype in DTYPES]
            list(pool.map(lambda pair: library.compile_all(*pair), pairs))
        yield "cpu"


@cache
def packed(fmt: QuantFormat, rows: int, blocks: int) -> Tensor:
    return ops.quantize(weight(fmt, rows=rows, blocks=blocks), fmt.name)


@cache
def activations(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))


def widths(fmt: QuantFormat) -> tuple[int, ...]:
    """In blocks: one, three, and about 2048 weights."""
    return (1, 3, 2048 // fmt.block)


def check_linear(fmt: QuantFormat, dtype: torch.dtype, device: str, rows: int, blocks: int, rows_of_x: int) -> None:
    case = LinearCase.of(activations(rows_of_x, blocks * fmt.block).to(dtype), packed(fmt, rows, blocks), fmt)
    y = metal.linear(case.x.to(device), case.packed.to(device), fmt.name).cpu()
    assert y.shape == (rows_of_x, rows) and y.dtype == dtype
    allowed = ROUNDING[dtype] + SEEN
    assert case.error(y) <= allowed * (1 + 3 / y.numel() ** 0.5), (rows, blocks, rows_of_x)


# ---- exact ops -------------------------------------------------------------------------------------------------------


@every_format
@every_dtype
def test_dequantize(fmt: QuantFormat, dtype: torch.dtype, device: str) -> None:
    for rows in ROWS:
        for blocks in widths(fmt):
            weights = packed(fmt, rows, blocks)
            exact = reference.dequantize(weights, fmt.name, dtype)
            assert bits(metal.dequantize(weights.to(device), fmt.name, dtype)).equal(bits(exact)), (rows, blocks)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
def test_dequantize_any_bytes(fmt: QuantFormat, device: str) -> None:
    """Every bit pattern of codes and scales; numbers that a GPU may round to zero stay out, and NaN has many patterns."""
    blocks = torch.randint(
        0, 256, (64, 3 * fmt.block_bytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    exact = reference.dequantize(blocks, fmt.name, torch.float32)
    got = metal.dequantize(blocks.to(device), fmt.name, torch.float32).cpu()
    normal = (exact == 0) | (exact.abs() >= 2.0**-126)
    known = normal & exact.isfinite()
    assert known.float().mean() > 0.3
    assert got[known].equal(exact[known])
    assert got[exact.isnan()].isnan().all()


@every_format
@every_dtype
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_embedding(fmt: QuantFormat, dtype: torch.dtype, id_type: torch.dtype, device: str) -> None:
    for blocks in widths(fmt):
        weights = packed(fmt, 33, blocks)
        exact = reference.dequantize(weights, fmt.name, dtype)
        for shape in ((), (1,), (2, 3), (0,)):
            ids = torch.randint(0, 33, shape, generator=torch.Generator().manual_seed(2), dtype=id_type)
            got = metal.embedding(ids.to(device), weights.to(device), fmt.name, dtype)
            assert got.shape == (*shape, exact.shape[1]) and bits(got).equal(bits(exact[ids.long()]))
    wrong = torch.tensor([33, -1, 0], dtype=id_type)
    got = metal.embedding(wrong.to(device), weights.to(device), fmt.name, dtype).cpu()
    assert got[:2].isnan().all() and got[2].isfinite().all()


def bits(t: Tensor) -> Tensor:
    """The bit patterns: tells zeros of different sign apart."""
    return t.cpu().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


# ---- products --------------------------------------------------------------------------------------------------------


@every_format
@every_dtype
@pytest.mark.parametrize("rows_of_x", [1, 2, 5, 33])
def test_linear(fmt: QuantFormat, dtype: torch.dtype, rows_of_x: int, device: str) -> None:
    for rows in ROWS:
        for blocks in widths(fmt):
            check_linear(fmt, dtype, device, rows, blocks, rows_of_x)


@pytest.mark.parametrize("fmt", OTHERS, ids=lambda f: f.name)
def test_linear_of_variants(fmt: QuantFormat, device: str) -> None:
    for rows_of_x in (1, 3, 4, 17):
        check_linear(fmt, torch.float32, device, 33, 3, rows_of_x)


@every_format
def test_every_number_of_rows_up_to_a_tile(fmt: QuantFormat, device: str) -> None:
    for rows_of_x in range(1, 20):
        check_linear(fmt, torch.float32, device, 9, 2, rows_of_x)


@every_dtype
def test_bias_shapes_and_strides(dtype: torch.dtype, device: str) -> None:
    fmt = get_format("q4k")
    weights = packed(fmt, 33, 2)
    bias = torch.randn(33)
    for shape in ((512,), (0, 512), (2, 3, 512), (1, 9, 512)):
        x = torch.randn(*shape).to(dtype)
        for rows in (x, x[..., None].expand(*shape, 2).to(device)[..., 0].cpu()):
            got = metal.linear(rows.to(device), weights.to(device), "q4k", bias.to(device)).cpu()
            want = reference.linear(rows, weights, "q4k", bias)
            assert got.shape == want.shape
            assert got.dtype == dtype
            assert (got - want).double().norm() <= (2 * ROUNDING[dtype] + SEEN) * want.double().norm()
    view = torch.cat([torch.zeros(1, dtype=torch.uint8), weights.flatten()])[1:].view(
        weights.shape
    )  # at an odd address
    x = torch.randn(3, 512, dtype=dtype).to(device)
    assert metal.linear(x, view.to(device), "q4k").equal(metal.linear(x, weights.to(device), "q4k"))


def test_many_rows_are_multiplied_by_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isqtorch.ops.metal.ops.limits", lambda: chips.Limits(gemv=2, gemm=6))
    monkeypatch.setattr("isqtorch.ops.metal.ops._DECODED_AT_ONCE", 5 * 768)
    fmt, bias = get_format("q6k"), torch.randn(33)
    for rows_of_x in (2, 3, 6, 7, 40):
        x = activations(rows_of_x, 768)
        got = metal.linear(x.to(device), packed(fmt, 33, 3).to(device), "q6k", bias.to(device)).cpu()
        torch.testing.assert_close(got, reference.linear(x, packed(fmt, 33, 3), "q6k", bias), rtol=1e-4, atol=1e-4)


@every_format
@every_dtype
def test_experts(fmt: QuantFormat, dtype: torch.dtype, device: str) -> None:
    experts, slots, k = 5, 2, 2 * fmt.block
    weights = packed(fmt, 35 * experts, 2).view(experts, 35, -1)
    bias = torch.randn(experts, 35, generator=torch.Generator().manual_seed(3)).to(dtype)
    for tokens in (1, 3, 40):
        generator = torch.Generator().manual_seed(tokens)
        some = torch.randint(0, experts + 1, (tokens, slots), generator=generator)
        one = torch.full((tokens, slots), 3, dtype=torch.int32)
        none = torch.full((tokens, slots), experts)
        for ids in (some, one, none):
            for shape in ((tokens, k), (tokens, slots, k)):
                x = torch.randn(*shape, generator=generator).to(dtype)
                arguments = (x, weights, fmt.name, ids, bias)
                got = metal.experts_linear(*moved(arguments, device)).cpu()
                want = reference.experts_linear(*arguments)
                assert got.dtype == dtype and got[ids == experts].count_nonzero() == 0
                error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9)
                assert error <= 2 * ROUNDING[dtype] + SEEN, (tokens, shape)


def moved(arguments: tuple[Any, ...], device: str) -> list[Any]:
    return [it.to(device) if isinstance(it, Tensor) else it for it in arguments]


def test_tiles_of_experts() -> None:
    """Tiles cover every pair of an expert that is here exactly once, in tiles of one expert."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        experts, pairs, height = (int(torch.randint(1, n, (), generator=generator)) for n in (9, 200, 33))
        ids = torch.randint(-1, experts + 1, (pairs,), generator=generator)
        order, (owners, firsts, heights) = metal.sorted_tiles(ids, experts, height)
        covered = []
        for owner, first, rows in zip(owners.tolist(), firsts.tolist(), heights.tolist(), strict=True):
            assert 0 <= rows <= height
            mine = order[first : first + rows]
            assert (ids[mine.long()] == owner).all()
            covered += mine.tolist()
        assert sorted(covered) == ((ids >= 0) & (ids < experts)).nonzero().flatten().tolist()


# ---- quantizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ON_GPU, ids=lambda f: f.name)
def test_quantize(fmt: QuantFormat, device: str) -> None:
    """The same bytes as on the CPU."""
    for dtype in DTYPES if fmt in FORMATS else DTYPES[:1]:
        for scale in (1.0, 1e-3, 300.0):
            w = scale * weight(fmt, rows=7, blocks=3)
            w[1], w[2], w[3, :40], w[4] = 0, -w[2].abs(), 0, w[4].abs()
            w[5, ::7] *= 20
            w = w.to(dtype)
            for rule in (None, "mlx") if fmt.solver == "affine" else (None,):
                assert (
                    metal.quantize(w.to(device), fmt.name, None, rule)
                    .cpu()
                    .equal(ops.quantize(w, fmt.name, None, rule))
                )


@every_format
def test_quantize_what_the_gpu_does_not(fmt: QuantFormat, device: str) -> None:
    """Searches and importance run on the CPU: the same bytes again, on the weight's device."""
    w, importance = weight(fmt, rows=3, blocks=2), torch.rand(2 * fmt.block)
    got = metal.quantize(w.to(device), fmt.name, importance.to(device))
    assert got.device.type == device and got.cpu().equal(ops.quantize(w, fmt.name, importance))
    if fmt.solver in ("affine", "hqq"):  # which use importance with this rule alone
        searched = metal.quantize(w.to(device), fmt.name, importance.to(device), "search").cpu()
        assert searched.equal(ops.quantize(w, fmt.name, importance, "search"))
        assert not searched.equal(ops.quantize(w, fmt.name, None, "search"))
    stack = torch.stack([w, -w])
    assert metal.quantize(stack.to(device), fmt.name).cpu().equal(ops.quantize(stack, fmt.name))


@pytest.mark.parametrize("fmt", ON_GPU, ids=lambda f: f.name)
def test_quantize_refuses_what_the_cpu_refuses(fmt: QuantFormat, device: str) -> None:
    for value in (float("nan"), float("-inf"), 3e38):
        w = weight(fmt, rows=4, blocks=2)
        w[2, fmt.block + 5] = value
        wants = refusal(ops.quantize, w, fmt)
        assert refusal(metal.quantize, w.to(device), fmt) == wants
        assert (wants is None) == (
            value == 3e38 and fmt.name in ("fp8", "mxfp4", *(f.name for f in ON_GPU if is_bf16(f)))
        ), wants


def is_bf16(fmt: QuantFormat) -> bool:
    return fmt.solver == "affine" and not fmt.name.endswith(".f16")


def refusal(quantize: Any, w: Tensor, fmt: QuantFormat) -> str | None:
    try:
        quantize(w, fmt.name)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_afq_by_the_mlx_rule_are_the_golden_codes(bits: int, device: str) -> None:
    goldens = golden("affine")
    w = goldens["afq/f32/W"]
    for group in (32, 64, 128):
        key, fmt = f"afq/f32/b{bits}_g{group}", get_format(f"afq{bits}g{group}")
        got = fmt.unpack(metal.quantize(w.to(device), fmt.name, None, "mlx").cpu().view(-1, fmt.block_bytes))
        assert got["q"].view(-1).equal(goldens[f"{key}/codes"].view(-1).to(torch.uint8))
        assert got["scale"].view(-1).equal(goldens[f"{key}/scales"].view(-1).to(torch.bfloat16))


# ---- order and races -------------------------------------------------------------------------------------------------


FIRST = ("q4_0", "q8_1", "q3k", "q5k", "afq3", "fp8")  # a format of every struct; the others are slow tests


@needs_clang
@pytest.mark.parametrize(
    "fmt",
    [pytest.param(fmt, marks=() if fmt.name in FIRST else pytest.mark.slow) for fmt in FORMATS],
    ids=[fmt.name for fmt in FORMATS],
)
def test_any_order_of_threads_and_no_races(fmt: QuantFormat) -> None:
    x, k, bias = activations(37, 3 * fmt.block), 3 * fmt.block, torch.randn(33)
    weights = packed(fmt, 66, 3)
    experts, ids = weights.view(2, 33, -1), torch.tensor([[0, 1], [1, 2], [1, 0]] * 8)

    def everything() -> list[Tensor]:
        found = [metal.linear(x[:m], weights[:33], fmt.name, bias) for m in (1, 3, 37)]
        found += [metal.experts_linear(x[: len(i)], experts, fmt.name, i) for i in (ids[:2], ids)]
        found += [metal.dequantize(weights[:5], fmt.name, torch.float32)]
        found += [metal.embedding(ids[:2], weights, fmt.name, torch.float32)]
        if struct_of(fmt.name).quantizes:
            found += [metal.quantize(weight(fmt, rows=5, blocks=3), fmt.name)]
        return found

    with runner.emulated(), runner.recording() as launches:
        results = everything()
    assert results[0].shape == (1, 33) and k % fmt.block == 0
    with runner.emulated():
        for order in ("reverse", "shuffled"):
            with runner.schedule(order):
                assert all(a.equal(b) for a, b in zip(results, everything(), strict=True)), order
    if races.available():
        assert races.find(launches) == ""


# ---- the host --------------------------------------------------------------------------------------------------------


def test_checks_are_the_reference_s(device: str) -> None:
    weights = packed(get_format("q4_0"), 4, 2).to(device)
    with pytest.raises(ValueError, match="the last dimension of x must be 64"):
        metal.linear(torch.zeros(2, 63, device=device), weights, "q4_0")
    with pytest.raises(ValueError, match="x must be one of float32, float16, bfloat16, got int32"):
        metal.linear(torch.zeros(2, 64, dtype=torch.int32, device=device), weights, "q4_0")
    with pytest.raises(ValueError, match="ids must be int64 or int32, got float32"):
        metal.embedding(torch.zeros(2, device=device), weights, "q4_0", torch.float32)
    with pytest.raises(ValueError, match="in_features must be a positive multiple of 32"):
        metal.quantize(torch.zeros(2, 33, device=device), "q4_0")


def test_a_compile_error_names_file_format_and_kernels() -> None:
    def refuse(source: str) -> None:
        raise SyntaxError("program_source:7: error: unknown type name")

    library.use_compiler(refuse)
    try:
        with pytest.raises(
            RuntimeError,
            match=r"(?s)/dequantize\.metal does not compile for q4k and half \(dequantize, .*:7: error",
        ):
            library.compile_all("q4k", torch.float16)
    finally:
        library.use_compiler(None)


def test_every_format_has_a_struct() -> None:
    for fmt in ALL_FORMATS:
        struct = struct_of(fmt.name)
        assert fmt.block % struct.unit == 0 and struct.header.startswith("metal/formats/")
