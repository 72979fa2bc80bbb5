"""The operators as torch sees them: native against reference, tracing, gradients, odd shapes, poisoned outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from helpers import (
    ALL_FORMATS,
    DTYPES,
    FORMATS,
    ROUNDING,
    before_a_guard_page,
    implementation,
    linear_error,
    run_flushing_denormals,
    weight,
)
from torch.library import opcheck

from isqtorch import ops
from isqtorch.formats import QuantFormat

every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fills what torch.empty returns with NaN or large integers, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ops.cpu_info().isa_with_formats)
def isa(request):
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa("")


# ---- every level computes the same ------------------------------------------------------------------------------------


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
def test_quantize_and_dequantize_equal_the_reference(fmt: QuantFormat, isa: str) -> None:
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
def test_magnitudes_far_apart_give_the_reference_bytes(name: str, isa: str) -> None:
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
def test_importance_gives_the_reference_bytes(fmt: QuantFormat, isa: str) -> None:
    w, importance, expected = weighted(fmt)
    assert torch.equal(ops.quantize(w, fmt.name, importance), expected)


@pytest.mark.parametrize("fmt", [fmt for fmt in ALL_FORMATS if fmt.solver == "affine"], ids=lambda f: f.name)
def test_groups_of_one_huge_number_give_the_reference_bytes(fmt: QuantFormat, isa: str) -> None:
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


# ---- strides, alignment, leading dimensions, empties --------------------------------------------------------------------


def test_packed_bytes_may_start_anywhere(fmt: QuantFormat, isa: str) -> None:
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
def test_nothing_is_read_beyond_the_end(fmt: QuantFormat, isa: str) -> None:
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


def test_flush_to_zero_changes_nothing(fmt: QuantFormat, isa: str) -> None:
    w = weight(fmt, rows=64, blocks=16) * 1e-7
    expected = ops.quantize(w, fmt.name)

    def check() -> None:
        assert torch.equal(ops.quantize(w, fmt.name), expected)

    run_flushing_denormals(check)


# ---- tracing and gradients -----------------------------------------------------------------------------------------------


def check_ops(fmt: QuantFormat, **options: Any) -> None:
    """torch's own checks of registered operators, on all."""
    w = weight(fmt, rows=6, blocks=2)
    packed = ops.quantize(w, fmt.name)
    x = torch.randn(3, w.shape[1], requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    opcheck(torch.ops.isqtorch.quantize.default, (w, fmt.name), **options)
    opcheck(torch.ops.isqtorch.quantize.default, (w.half(), fmt.name, torch.rand(w.shape[1]), None), **options)
    opcheck(torch.ops.isqtorch.dequantize.default, (packed, fmt.name, torch.bfloat16), **options)
    opcheck(torch.ops.isqtorch.linear.default, (x, packed, fmt.name), **options)
    opcheck(torch.ops.isqtorch.linear.default, (x, packed, fmt.name, bias), **options)
    opcheck(torch.ops.isqtorch.linear_frozen.default, (x.detach(), packed, fmt.name, bias.detach()), **options)
    ids = torch.tensor([[1, 5]])
    opcheck(torch.ops.isqtorch.embedding.default, (ids, packed, fmt.name, torch.float32), **options)


def test_schema_autograd_and_fakes(fmt: QuantFormat) -> None:
    check_ops(fmt, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


# Tracing through autograd takes seconds and sees no more of a format than its block: one of each size, all in `make test-all`.
of_each_block = {fmt.block: fmt for fmt in FORMATS}.values()


@pytest.mark.parametrize(
    "fmt", [pytest.param(f, id=f.name, marks=() if f in of_each_block else pytest.mark.slow) for f in FORMATS]
)
def test_traces_through_autograd(fmt: QuantFormat) -> None:
    check_ops(fmt, test_utils="test_aot_dispatch_dynamic")


@every_dtype
def test_gradients(fmt: QuantFormat, dtype: torch.dtype) -> None:
    packed = ops.quantize(weight(fmt, rows=6, blocks=2), fmt.name)
    x = torch.randn(2, 5, 2 * fmt.block, generator=torch.Generator().manual_seed(6)).to(dtype).requires_grad_()
    bias = torch.randn(6).to(dtype).requires_grad_()
    dy = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(7)).to(dtype)
    ops.linear(x, packed, fmt.name, bias).backward(dy)
    w = ops.dequantize(packed, fmt.name, dtype)
    torch.testing.assert_close(x.grad, dy @ w)
    torch.testing.assert_close(bias.grad, dy.float().sum((0, 1)).to(dtype))
    x.grad = None
    ops.linear(x, packed, fmt.name).backward(dy)  # without a bias
    torch.testing.assert_close(x.grad, dy @ w)


def test_gradcheck(fmt: QuantFormat) -> None:
    packed = ops.quantize(weight(fmt, rows=2, blocks=1), fmt.name)
    # linear in x, so a wide step keeps the rounding of activations out of the numeric derivative, nearly
    x = torch.randn(2, fmt.block, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x: ops.linear(x, packed, fmt.name), (x,), eps=1.0, atol=0.1, rtol=5e-2, nondet_tol=0.0)


def test_compiles_into_one_graph(fmt: QuantFormat) -> None:
    torch.compiler.reset()  # one graph per format, more than torch keeps for one function
    packed = ops.quantize(weight(fmt, rows=6, blocks=2), fmt.name)

    def two_layers(x: torch.Tensor) -> torch.Tensor:
        return (
            ops.linear(torch.relu(x), packed, fmt.name).sum(-1)
            + ops.embedding(torch.tensor([1]), packed, fmt.name, torch.float32).sum()
        )

    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (1, 4, 11):
        x = torch.randn(m, 2 * fmt.block)
        torch.testing.assert_close(compiled(x), two_layers(x))


def test_fakes_report_shapes_and_faults() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for fmt in FORMATS:
        w = torch.empty(3, 2, fmt.block * 2, device="meta")
        packed = ops.quantize(w, fmt.name)
        assert packed.shape == (3, 2, fmt.row_bytes(fmt.block * 2)) and packed.dtype == torch.uint8
        assert ops.dequantize(packed, fmt.name, torch.float16).shape == w.shape
    with FakeTensorMode(), pytest.raises(ValueError, match="multiple of 256, got 288"):
        ops.quantize(torch.empty(2, 288), "q4k")
    with FakeTensorMode(), pytest.raises(ValueError, match="multiple of 144 bytes, got 100"):
        ops.dequantize(torch.empty(2, 100, dtype=torch.uint8), "q4k", torch.float32)


# ---- misuse: both implementations refuse the same, in the same words --------------------------------------------------------

packed_q4k = torch.zeros(6, 144, dtype=torch.uint8)
FAULTS = {
    "integer weight": (
        ValueError,
        "weight must be one of",
        lambda o: o.quantize(torch.ones(2, 32, dtype=torch.int32), "q8_0"),
    ),
    "vector weight": (ValueError, r"at least 2 dimensions.*\[32\]", lambda o: o.quantize(torch.ones(32), "q8_0")),
    "K too short": (ValueError, "multiple of 256, got 288", lambda o: o.quantize(torch.ones(2, 288), "q4k")),
    "K zero": (ValueError, "multiple of 32, got 0", lambda o: o.quantize(torch.ones(2, 0), "q8_0")),
    "nan": (ValueError, r"weight\[1, 33\] is nan; q8_0 needs", lambda o: o.quantize(poisoned(float("nan")), "q8_0")),
    "inf": (ValueError, r"weight\[1, 33\] is inf; q4k needs", lambda o: o.quantize(poisoned(float("inf")), "q4k")),
    "-inf, hqq": (ValueError, r"weight\[1, 33\] is -inf; hqq4", lambda o: o.quantize(poisoned(-float("inf")), "hqq4")),
    "nan in bf16": (
        ValueError,
        r"weight\[1, 33\] is nan",
        lambda o: o.quantize(poisoned(float("nan")).bfloat16(), "afq4"),
    ),
    "importance length": (
        ValueError,
        r"importance must have shape \[256\].*got \[255\]",
        lambda o: o.quantize(torch.ones(2, 256), "q4k", torch.ones(255)),
    ),
    "importance per matrix": (
        ValueError,
        r"or \[3, 256\], one vector per matrix; got \[2, 256\]",
        lambda o: o.quantize(torch.ones(3, 2, 256), "q4k", torch.ones(2, 256)),
    ),
    "importance type": (
        ValueError,
        "importance must be a float tensor, got int64",
        lambda o: o.quantize(torch.ones(2, 32), "q4_0", torch.ones(32, dtype=torch.int64)),
    ),
    "importance negative": (
        ValueError,
        r"importance\[3\] is -0.5.*not negative",
        lambda o: o.quantize(torch.ones(2, 32), "q4_0", negative_at_3()),
    ),
    "rule": (
        ValueError,
        "afq4 has no rule 'best'.*'mlx'",
        lambda o: o.quantize(torch.ones(2, 64), "afq4", None, "best"),
    ),
    "rule of a family without": (
        ValueError,
        "q4k has no rule 'mlx'",
        lambda o: o.quantize(torch.ones(2, 256), "q4k", None, "mlx"),
    ),
    "f16 overflow": (
        ValueError,
        "afq4.f16.*too large for its 16-bit scale. Use afq4,",
        lambda o: o.quantize(torch.full((2, 64), 3e38), "afq4.f16"),
    ),
    "packed type": (
        ValueError,
        "packed weight is uint8, got int8",
        lambda o: o.dequantize(packed_q4k.char(), "q4k", torch.float32),
    ),
    "packed vector": (
        ValueError,
        r"at least 2 dim.*\[144\]",
        lambda o: o.dequantize(packed_q4k[0], "q4k", torch.float32),
    ),
    "packed cut": (
        ValueError,
        "multiple of 144 bytes, got 100",
        lambda o: o.dequantize(packed_q4k[:, :100], "q4k", torch.float32),
    ),
    "output dtype": (ValueError, "dtype must be one of.*int8", lambda o: o.dequantize(packed_q4k, "q4k", torch.int8)),
    "x too short": (
        ValueError,
        r"last dimension of x must be 256.*\[3, 255\]",
        lambda o: o.linear(torch.ones(3, 255), packed_q4k, "q4k"),
    ),
    "x of bytes": (
        ValueError,
        "x must be one of.*uint8",
        lambda o: o.linear(torch.ones(3, 256, dtype=torch.uint8), packed_q4k, "q4k"),
    ),
    "x scalar": (ValueError, "last dimension of x", lambda o: o.linear(torch.tensor(1.0), packed_q4k, "q4k")),
    "weight of linear stacked": (
        ValueError,
        r"2 dimensions \[N, row_bytes\]",
        lambda o: o.linear(torch.ones(3, 256), packed_q4k[None], "q4k"),
    ),
    "bias length": (
        ValueError,
        r"bias must have shape \[6\], got \[5\]",
        lambda o: o.linear(torch.ones(3, 256), packed_q4k, "q4k", torch.ones(5)),
    ),
    "id too large": (
        IndexError,
        r"ids\[1, 0\] is 6, but the table has 6 rows",
        lambda o: o.embedding(torch.tensor([[0], [6]]), packed_q4k, "q4k", torch.float32),
    ),
    "id negative": (
        IndexError,
        r"ids\[0\] is -1",
        lambda o: o.embedding(torch.tensor([-1]), packed_q4k, "q4k", torch.float32),
    ),
    "ids float": (
        ValueError,
        "ids must be int64 or int32, got float32",
        lambda o: o.embedding(torch.tensor([1.0]), packed_q4k, "q4k", torch.float32),
    ),
}


def poisoned(value: float) -> torch.Tensor:
    w = torch.ones(2, 256)
    w[1, 33] = w[1, 200] = value
    return w


def negative_at_3() -> torch.Tensor:
    v = torch.ones(32)
    v[3] = -0.5
    return v


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_both_implementations(name: str) -> None:
    kind, pattern, call = FAULTS[name]
    messages = []
    for implementation_name in ("reference", "native"):
        with pytest.raises(kind, match=pattern) as caught:
            call(implementation(implementation_name))
        messages.append(str(caught.value))
    if not name.startswith("K "):  # those name a way out that only the registry knows
        assert messages[0] == messages[1]


def test_unknown_format_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="q9k.*q4_0.*afq4"):
        ops.quantize(torch.ones(2, 256), "q9k")


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "Meta"])
def test_every_device_has_every_operator(key: str) -> None:
    """`linear_frozen` comes with `linear`: QuantLinear calls either."""
    for name in ("quantize", "dequantize", "linear", "linear_frozen", "embedding"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"isqtorch::{name}", key), name
