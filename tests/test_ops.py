"""The operators on the CPU: every level against the reference, odd shapes and strides, poisoned outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from helpers import (
    ALL_FORMATS,
    DTYPES,
    ROUNDING,
    before_a_guard_page,
    every_dtype,
    every_variant,
    linear_error,
    run_flushing_denormals,
    weight,
)

from isqtorch import ops
from isqtorch.formats import QuantFormat

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


# ---- every level computes the same -----------------------------------------------------------------------------------


# What the reference makes of a weight is computed once for all levels.


@cache
def uneven_weight(fmt: QuantFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros, one sign, outliers; and the reference's bytes."""
    w = weight(fmt, rows=7, blocks=5) * 0.03
    w[2] = 0
    w[3] = -w[3].abs()
    w[4, ::17] *= 50
    return w, ops.reference.quantize(w, fmt.name)


@every_variant
def test_quantize_and_dequantize_equal_the_reference(fmt: QuantFormat, format_isa: str) -> None:
    w, expected = uneven_weight(fmt)
    packed = ops.quantize(w, fmt.name)
    assert torch.equal(packed, expected)
    for dtype in DTYPES:
        want = ops.reference.dequantize(packed, fmt.name, dtype)
        assert torch.equal(ops.dequantize(packed, fmt.name, dtype), want), dtype


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-8, 1e4, 1e8, 1e15, 1e19, 1e30])
@every_variant
def test_extreme_weights_give_the_reference_bytes_or_refusal(fmt: QuantFormat, scale: float) -> None:
    w = weight(fmt, rows=3, blocks=3) * scale
    w[1, : fmt.block] = 0
    for importance in (None, torch.rand(w.shape[1])):
        results = []
        for quantize in (ops.reference.quantize, ops.quantize):
            try:
                results.append(quantize(w, fmt.name, importance).tolist())
            except ValueError as error:
                results.append(str(error))
        assert results[0] == results[1]


@cache
def magnitudes_far_apart(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[bool, torch.Tensor]]:
    """A weight, an importance vector, and the reference's bytes without it and with it."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (300, 1024), generator=g).to(torch.int32) & ~(1 << 30)
    w = bits.view(torch.float32) * torch.where(torch.rand(bits.shape, generator=g) < 0.5, 2.0**9, 1.0)
    w = w.to(torch.bfloat16)
    importance = torch.randn(1024, generator=g).mul(3).exp() * (torch.rand(1024, generator=g) > 0.4)
    expected = {given: ops.reference.quantize(w, name, importance if given else None) for given in (False, True)}
    return w, importance, expected


@pytest.mark.parametrize("name", ["q2k", "q3k", "q4k", "q5k", "q6k"])
def test_magnitudes_far_apart_give_the_reference_bytes(name: str, format_isa: str) -> None:
    """Some of these blocks get fits so bad that ggml's rounding wraps around."""
    w, importance, expected = magnitudes_far_apart(name)
    for given, want in expected.items():
        assert torch.equal(ops.quantize(w, name, importance if given else None), want)


@cache
def weighted(fmt: QuantFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, its importance, the reference's bytes."""
    w = weight(fmt, rows=5, blocks=3)
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) ** 3
    importance[:16] = 0
    return w, importance, ops.reference.quantize(w, fmt.name, importance)


@every_variant
def test_importance_gives_the_reference_bytes(fmt: QuantFormat, format_isa: str) -> None:
    w, importance, expected = weighted(fmt)
    assert torch.equal(ops.quantize(w, fmt.name, importance), expected)


@pytest.mark.parametrize("fmt", [fmt for fmt in ALL_FORMATS if fmt.solver == "affine"], ids=lambda f: f.name)
def test_groups_of_one_huge_number_give_the_reference_bytes(fmt: QuantFormat, format_isa: str) -> None:
    """Their scale is 0, so that codes would be NaN, which no bits of neighbours may be lost to."""
    for value in (1e34, -1e34, float(torch.tensor(1e34).bfloat16())):
        w = torch.full((2, 2 * fmt.block), value if not fmt.name.endswith(".f16") else value / 1e30)
        for rule in (None, "mlx"):
            packed = ops.quantize(w, fmt.name, None, rule)
            assert torch.equal(packed, ops.reference.quantize(w, fmt.name, None, rule)), (value, rule)


def test_levels_are_listed_forced_and_refused() -> None:
    info = ops.cpu_info()
    assert set(info.isa_supported) <= set(info.isa_compiled) and info.isa_compiled[0] == "baseline"
    assert info.isa_selected == info.isa_supported[-1]
    ops.set_cpu_isa("baseline")
    assert ops.cpu_info().isa_selected == "baseline" and "set_cpu_isa" in ops.cpu_info().reason
    ops.set_cpu_isa("")
    assert ops.cpu_info() == info
    with pytest.raises(ValueError, match='no instruction-set level "sse9".*baseline'):
        ops.set_cpu_isa("sse9")


def in_new_process(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ISQTORCH_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_the_environment_chooses_a_level() -> None:
    code = "from isqtorch import ops; info = ops.cpu_info(); print(info.isa_selected, '|', info.reason)"
    done = in_new_process(code, "baseline")
    assert done.stdout.startswith("baseline | ") and "ISQTORCH_CPU_ISA" in done.stdout
    done = in_new_process(code, "")
    assert done.stdout.startswith(ops.cpu_info().isa_selected)
    done = in_new_process(code, "mmx")
    assert done.returncode != 0 and 'ISQTORCH_CPU_ISA: no instruction-set level "mmx". Levels: baseline' in done.stderr


def test_native_formats_are_the_registry() -> None:
    native = ops.cpu_info().formats
    assert native == {f.name: {"block": f.block, "block_bytes": f.block_bytes} for f in ALL_FORMATS}


# ---- strides, alignment, leading dimensions, empties -----------------------------------------------------------------


def test_packed_bytes_may_start_anywhere(fmt: QuantFormat, format_isa: str) -> None:
    packed = ops.quantize(weight(fmt, rows=6), fmt.name)
    k = 4 * fmt.block
    x1, x9 = torch.randn(1, k), torch.randn(9, k)
    for offset in (1, 2, 3, 5):
        buffer = torch.empty(packed.numel() + offset, dtype=torch.uint8)
        shifted = buffer[offset:].view_as(packed).copy_(packed)
        assert torch.equal(
            ops.dequantize(shifted, fmt.name, torch.float32), ops.dequantize(packed, fmt.name, torch.float32)
        )
        for x in (x1, x9):
            assert torch.equal(ops.linear(x, shifted, fmt.name), ops.linear(x, packed, fmt.name))


@every_variant
def test_nothing_is_read_beyond_the_end(fmt: QuantFormat, format_isa: str) -> None:
    """`linear` has a test of its own, for every level."""
    ids = torch.tensor([2, 0])
    for dtype in DTYPES:
        w, importance = weight(fmt, rows=3, blocks=3).to(dtype), torch.rand(3 * fmt.block)
        packed = ops.quantize(w, fmt.name, importance)
        assert torch.equal(ops.quantize(before_a_guard_page(w), fmt.name, before_a_guard_page(importance)), packed)
        for gap in (0, 1):
            at_end = before_a_guard_page(packed, gap)
            weights = ops.dequantize(packed, fmt.name, dtype)
            assert torch.equal(ops.dequantize(at_end, fmt.name, dtype), weights)
            assert torch.equal(ops.embedding(before_a_guard_page(ids), at_end, fmt.name, dtype), weights[ids])


def test_strided_arguments(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=8)
    packed = ops.quantize(w, fmt.name)
    assert torch.equal(ops.quantize(w.t().contiguous().t(), fmt.name), packed)
    assert torch.equal(ops.quantize(torch.stack([w, w], 1).flatten(0, 1)[::2], fmt.name), packed)
    x = torch.randn(w.shape[1], 5).t()
    assert torch.equal(ops.linear(x, packed, fmt.name), ops.linear(x.contiguous(), packed, fmt.name))
    assert torch.equal(
        ops.linear(x.contiguous(), packed[::2], fmt.name), ops.linear(x, packed, fmt.name)[:, ::2].contiguous()
    )


def test_stacked_matrices_are_quantized_one_by_one(fmt: QuantFormat) -> None:
    w = torch.stack([weight(fmt, rows=4, seed=s) * (s + 1) for s in range(3)])
    packed = ops.quantize(w, fmt.name)
    assert torch.equal(packed, torch.stack([ops.quantize(matrix, fmt.name) for matrix in w]))
    assert torch.equal(packed, ops.reference.quantize(w, fmt.name))
    assert ops.dequantize(packed, fmt.name, torch.float32).shape == w.shape
    vectors = torch.rand(3, w.shape[-1])
    own = ops.quantize(w, fmt.name, vectors)
    assert torch.equal(own, torch.stack([ops.quantize(m, fmt.name, v) for m, v in zip(w, vectors, strict=True)]))


def test_empty_tensors(fmt: QuantFormat) -> None:
    k = 2 * fmt.block
    assert ops.quantize(torch.empty(0, k), fmt.name).shape == (0, fmt.row_bytes(k))
    packed = ops.quantize(weight(fmt, rows=3, blocks=2), fmt.name)
    assert ops.linear(torch.empty(0, k), packed, fmt.name).shape == (0, 3)
    assert ops.linear(torch.empty(2, 0, k), packed, fmt.name).shape == (2, 0, 3)
    assert ops.linear(torch.randn(2, k), packed[:0], fmt.name).shape == (2, 0)
    assert ops.embedding(torch.empty(0, dtype=torch.int64), packed, fmt.name, torch.float32).shape == (0, k)
    assert ops.dequantize(packed[:0], fmt.name, torch.float16).shape == (0, k)


@every_dtype
def test_leading_dimensions_and_bias(fmt: QuantFormat, dtype: torch.dtype) -> None:
    packed = ops.quantize(weight(fmt, rows=5, blocks=2), fmt.name)
    x = torch.randn(2, 3, 4, 2 * fmt.block, generator=torch.Generator().manual_seed(4)).to(dtype)
    bias = torch.randn(5, generator=torch.Generator().manual_seed(5))
    y = ops.linear(x, packed, fmt.name, bias.to(dtype))
    error = linear_error(y.double() - bias.to(dtype).double(), x, packed, fmt)
    assert y.shape == (2, 3, 4, 5) and error <= fmt.linear_error + ROUNDING[dtype]
    one = ops.linear(x[0, 0, 0], packed, fmt.name, bias)  # a vector; a bias in another float type
    assert one.shape == (5,) and one.dtype == dtype


@every_dtype
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_embedding_is_rows_of_dequantize(fmt: QuantFormat, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    packed = ops.quantize(weight(fmt, rows=11), fmt.name)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]], dtype=ids_dtype)
    rows = ops.embedding(ids, packed, fmt.name, dtype)
    assert torch.equal(rows, ops.dequantize(packed, fmt.name, dtype)[ids.long()])
    assert torch.equal(rows, ops.reference.embedding(ids, packed, fmt.name, dtype))


def test_threads_do_not_change_anything(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=300, blocks=8)
    x = torch.randn(3, w.shape[1])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            packed = ops.quantize(w, fmt.name)
            results.append((packed, ops.linear(x, packed, fmt.name), ops.dequantize(packed, fmt.name, torch.bfloat16)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_flush_to_zero_changes_nothing(fmt: QuantFormat, format_isa: str) -> None:
    w = weight(fmt, rows=64, blocks=16) * 1e-7
    expected = ops.quantize(w, fmt.name)

    def check() -> None:
        assert torch.equal(ops.quantize(w, fmt.name), expected)

    run_flushing_denormals(check)
