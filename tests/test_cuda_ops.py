"""The operators of CUDA, with the kernels in the emulator and CPU tensors for CUDA's: what they accept and refuse, which memory
they hand to the kernels, and that their results are those of the reference. The kernels have tests of their own.

Where there is a GPU, `-m cuda` runs the same tests on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from emulator.ops import emulated
from helpers import ALL_FORMATS, DTYPES, FORMATS, ROUNDING, LinearCase, relative_error, shifted, weight
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat
from isqtorch.quantizers import has_rule

every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)
SOME = [fmt for fmt in FORMATS if fmt.name in ("q4_0", "q6k", "afq3", "hqq4", "fp8")]  # one of each family and layout
some = pytest.mark.parametrize("fmt", SOME, ids=lambda fmt: fmt.name)


@pytest.fixture(scope="module", params=["emulator", pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu(request: pytest.FixtureRequest) -> Any:
    return OnCuda() if request.param == "cuda" else emulated()


class OnCuda:
    """torch.ops.isqtorch on the GPU, for arguments and results on the CPU."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.isqtorch, name)

        def call(*arguments: Any, **named: Any) -> Any:
            result = op(*map(self._there, arguments), **{key: self._there(value) for key, value in named.items()})
            return result.cpu() if isinstance(result, Tensor) else result

        return call

    @staticmethod
    def _there(value: Any) -> Any:
        """On the GPU, as far from an aligned address as here."""
        if not isinstance(value, Tensor):
            return value
        if not value.is_contiguous() or value.data_ptr() % 16 == 0:
            return value.cuda()
        off = value.data_ptr() % 16
        room = torch.empty(value.nbytes + off, dtype=torch.uint8, device="cuda")
        return room[off:].view(value.dtype).view(value.shape).copy_(value)


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fills what is allocated with NaN or large integers, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@cache
def packed_weight(fmt: QuantFormat, rows: int = 19, blocks: int = 2) -> Tensor:
    return ops.quantize(weight(fmt, rows, blocks), fmt.name)


# ---- the table --------------------------------------------------------------------------------------------------------


def test_every_format_has_kernels(gpu: Any) -> None:
    """`cuda_info` lists exactly the registry's formats, with the registry's sizes."""
    found = json.loads(gpu.cuda_info())["formats"]
    assert {name: (facts["block"], facts["block_bytes"]) for name, facts in found.items()} == {
        fmt.name: (fmt.block, fmt.block_bytes) for fmt in ALL_FORMATS
    }
    assert all(8 == facts["few_rows"] < facts["max_rows"] for facts in found.values())


# ---- quantize ---------------------------------------------------------------------------------------------------------


@every_variant
def test_quantize_equals_the_reference(gpu: Any, fmt: QuantFormat) -> None:
    w = weight(fmt, rows=5, blocks=2)
    assert torch.equal(gpu.quantize(w, fmt.name), ops.quantize(w, fmt.name))


@some
def test_quantize_takes_stacks_strides_and_types(gpu: Any, fmt: QuantFormat) -> None:
    w = weight(fmt, rows=6, blocks=2)
    stack = w.view(2, 3, -1)
    importance = torch.rand(2, w.shape[1]) + 0.1
    for source in (stack, stack.transpose(0, 1), stack.double(), stack.bfloat16(), shifted(stack.half(), 2), stack[:0]):
        want = ops.quantize(source.contiguous(), fmt.name)
        assert torch.equal(gpu.quantize(source, fmt.name), want)
    for vectors in (importance, importance[0].double()):
        assert torch.equal(gpu.quantize(stack, fmt.name, vectors), ops.quantize(stack, fmt.name, vectors))


@pytest.mark.parametrize("fmt", [fmt for fmt in ALL_FORMATS if has_rule(fmt, "search")], ids=lambda fmt: fmt.name)
def test_quantize_knows_the_other_rules(gpu: Any, fmt: QuantFormat) -> None:
    stack = weight(fmt, rows=6, blocks=2).view(2, 3, -1)
    for rule in ("mlx", "search"):
        if has_rule(fmt, rule):
            for importance in (None, torch.rand(2, stack.shape[-1])):
                want = ops.quantize(stack, fmt.name, importance, rule)
                assert torch.equal(gpu.quantize(stack, fmt.name, importance, rule), want), rule


# ---- dequantize, embedding --------------------------------------------------------------------------------------------


@every_variant
def test_dequantize_equals_the_reference(gpu: Any, fmt: QuantFormat) -> None:
    packed = packed_weight(fmt)
    stack = packed[:18].view(2, 9, -1)
    views = [packed, stack, stack.transpose(0, 1), stack[:0], packed[:, : fmt.block_bytes], shifted(packed, 1)]
    for dtype in DTYPES:
        for view in views:
            got = gpu.dequantize(view, fmt.name, dtype)
            assert torch.equal(got, ops.dequantize(view.contiguous(), fmt.name, dtype))


@some
def test_embedding_equals_the_reference(gpu: Any, fmt: QuantFormat) -> None:
    packed = packed_weight(fmt)
    ids = torch.tensor([[0, 18, 3], [3, 3, 7]])
    for chosen in (ids, ids.int(), ids.t(), ids[0, 0], ids[:0]):
        for dtype in DTYPES:
            got = gpu.embedding(chosen, packed, fmt.name, dtype)
            assert torch.equal(got, ops.embedding(chosen, packed, fmt.name, dtype))


@pytest.mark.parametrize("bad", [-1, 19])
def test_an_id_without_a_row_is_an_error_of_the_device(bad: int) -> None:
    """In the emulator only: a GPU's context does not survive it."""
    with pytest.raises(RuntimeError, match="embedding: .*an id names no row"):
        emulated().embedding(torch.tensor([0, bad]), packed_weight(SOME[0]), SOME[0].name, torch.float32)


# ---- linear -----------------------------------------------------------------------------------------------------------


def check_linear(gpu: Any, fmt: QuantFormat, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> None:
    """Within the format's bound of the exact product, plus the rounding of the result."""
    y = gpu.linear(x, packed, fmt.name, bias)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], packed.shape[0]) and y.is_contiguous()
    if bias is not None:
        y = y.float() - bias.float()
    error = LinearCase.of(x.reshape(-1, x.shape[-1]), packed.contiguous(), fmt).error(y.reshape(-1, y.shape[-1]))
    assert error < fmt.linear_error + 2 * ROUNDING[x.dtype], error


@every_variant
def test_linear_is_close(gpu: Any, fmt: QuantFormat) -> None:
    packed = packed_weight(fmt)
    x = torch.randn(3, 2 * fmt.block)
    for dtype in DTYPES:
        check_linear(gpu, fmt, x.to(dtype), packed)


@some
def test_linear_takes_any_shape_stride_and_bias(gpu: Any, fmt: QuantFormat) -> None:
    packed, k = packed_weight(fmt), 2 * fmt.block
    x = torch.randn(2, 3, 2 * k).bfloat16()
    for bias in (None, torch.randn(19), torch.randn(19).bfloat16(), torch.randn(38).half()[::2]):
        for view in (x[..., :k], x[..., ::2], x[0, 0, :k], x[..., k:].transpose(0, 1), shifted(x[0, :, :k], 2)):
            check_linear(gpu, fmt, view, packed, bias)
    check_linear(gpu, fmt, x[..., :k], shifted(packed, 1))
    check_linear(gpu, fmt, x[..., : fmt.block], packed[:, : fmt.block_bytes])  # a strided weight: half of each row
    frozen = gpu.linear_frozen(x[..., :k], packed, fmt.name)
    assert torch.equal(frozen, gpu.linear(x[..., :k], packed, fmt.name))


def test_linear_of_nothing(gpu: Any) -> None:
    packed = packed_weight(SOME[0])
    assert gpu.linear(torch.zeros(2, 0, 64), packed, "q4_0").shape == (2, 0, 19)
    assert gpu.linear(torch.zeros(3, 64), packed[:0], "q4_0").shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_on_both_sides_of_the_border(gpu: Any, dtype: torch.dtype) -> None:
    """From max_rows + 1 rows of x on, slices of the weight are decoded and torch multiplies."""
    fmt = FORMATS[0]
    border = json.loads(gpu.cuda_info())["formats"][fmt.name]["max_rows"]
    packed, bias = packed_weight(fmt), torch.randn(19)
    x = torch.randn(border + 1, 2 * fmt.block).to(dtype)
    for m in (border, border + 1):
        check_linear(gpu, fmt, x[:m], packed)
        check_linear(gpu, fmt, x[:m], packed, bias)


def test_linear_decodes_slice_by_slice(gpu: Any) -> None:
    """A weight whose floats exceed a slice: every slice gets its rows, its outputs and its part of the bias."""
    k, n = 2048, 2 * 4096 + 300  # of f32, 4096 rows stay in the cache: three slices of 2944 rows, the last has fewer
    rows = torch.randn(37, k) / 64
    table = ops.quantize(rows, "q8_0")
    packed = table[torch.arange(n) % 37]
    x, bias = torch.randn(513, k), torch.randn(n)
    y = gpu.linear(x, packed, "q8_0", bias)
    want = (x @ ops.dequantize(table, "q8_0", torch.float32).t())[:, torch.arange(n) % 37] + bias
    assert relative_error(y, want) < 1e-5


# ---- experts_linear ---------------------------------------------------------------------------------------------------


@some
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_experts_equal_the_reference(gpu: Any, fmt: QuantFormat, tokens: int) -> None:
    experts, n, k, slots = 4, 6, 2 * fmt.block, 2
    packed = ops.quantize(weight(fmt, experts * n, 2).view(experts, n, k), fmt.name)
    ids = torch.randint(experts + 1, (tokens, slots))  # experts: one that is not here
    for x in (torch.randn(tokens, k).bfloat16(), torch.randn(tokens, 2 * slots, k).bfloat16()[:, ::2]):
        for chosen in (ids, ids.int(), ids.flip(1)):
            for bias in (None, torch.randn(experts, n)):
                y = gpu.experts_linear(x, packed, fmt.name, chosen, bias)
                want = ops.reference.experts_linear(x, packed, fmt.name, chosen, bias)
                assert y.dtype == x.dtype
                here = chosen < experts
                assert (y[~here] == 0).all()
                if here.any():
                    assert relative_error(y[here], want[here]) < fmt.linear_error + 2 * ROUNDING[x.dtype]


def test_experts_of_nothing(gpu: Any) -> None:
    packed = packed_weight(SOME[0])[:18].view(2, 9, -1)
    ids = torch.zeros(0, 2, dtype=torch.long)
    assert gpu.experts_linear(torch.zeros(0, 64), packed, "q4_0", ids).shape == (0, 2, 9)
    nowhere = gpu.experts_linear(torch.ones(3, 64), packed[:0], "q4_0", torch.zeros(3, 2, dtype=torch.long))
    assert torch.equal(nowhere, torch.zeros(3, 2, 9))  # no expert is here


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("tokens", [1, 70])
def test_an_id_without_an_expert_is_an_error_of_the_device(bad: int, tokens: int) -> None:
    packed = packed_weight(SOME[0])[:18].view(2, 9, -1)
    ids = torch.zeros(tokens, 2, dtype=torch.long)
    ids[-1, 1] = bad
    with pytest.raises(RuntimeError, match="experts_linear: "):
        emulated().experts_linear(torch.zeros(tokens, 64), packed, "q4_0", ids)


# ---- faults -----------------------------------------------------------------------------------------------------------

W = torch.linspace(-1, 1, 8 * 256).view(8, 256)
Q4 = ops.quantize(W, "q4_0")
STACK = Q4.view(2, 4, -1)
X = torch.zeros(2, 256)
IDS = torch.zeros(2, 3, dtype=torch.long)


def spoiled(value: float) -> Tensor:
    w = W.clone().view(2, 4, 256)
    w[1, 2, 5] = value
    return w


MISUSES: dict[str, Callable[[Any], object]] = {
    "quantize integers": lambda o: o.quantize(W.int(), "q4_0"),
    "quantize a vector": lambda o: o.quantize(W[0], "q4_0"),
    "quantize no columns": lambda o: o.quantize(W[:, :0], "q4k"),
    "quantize half a block": lambda o: o.quantize(W[:, :100], "q4k"),
    "quantize nan": lambda o: o.quantize(spoiled(float("nan")), "q4_0"),
    "quantize inf": lambda o: o.quantize(spoiled(float("inf")), "q4_0"),
    "quantize -inf": lambda o: o.quantize(spoiled(float("-inf")).bfloat16(), "q4k"),
    "quantize too large": lambda o: o.quantize(spoiled(1e30), "q4_0"),
    "quantize too large, f16 scales": lambda o: o.quantize(spoiled(1e30), "afq4.f16"),
    "search in nan": lambda o: o.quantize(spoiled(float("nan")), "afq4", rule="search"),
    "search in inf": lambda o: o.quantize(spoiled(float("inf")), "hqq4", rule="search"),
    "search in too large": lambda o: o.quantize(spoiled(1e30), "afq4.f16", rule="search"),
    "search with negative importance": lambda o: o.quantize(spoiled(0), "hqq4", -torch.ones(2, 256), "search"),
    "quantize with an unknown rule": lambda o: o.quantize(W, "afq4", rule="best"),
    "quantize with a rule where there is none": lambda o: o.quantize(W, "q4_0", rule="mlx"),
    "importance of another size": lambda o: o.quantize(W, "q4k", torch.ones(255)),
    "importance of other matrices": lambda o: o.quantize(spoiled(0), "q4k", torch.ones(3, 256)),
    "importance of integers": lambda o: o.quantize(W, "q4k", torch.ones(256, dtype=torch.int)),
    "negative importance": lambda o: o.quantize(spoiled(0), "q4k", -torch.ones(2, 256)),
    "dequantize floats": lambda o: o.dequantize(W, "q4_0", torch.float32),
    "dequantize a vector": lambda o: o.dequantize(Q4[0], "q4_0", torch.float32),
    "dequantize half a block": lambda o: o.dequantize(Q4[:, :17], "q4_0", torch.float32),
    "dequantize to integers": lambda o: o.dequantize(Q4, "q4_0", torch.int8),
    "embedding with float ids": lambda o: o.embedding(X, Q4, "q4_0", torch.float32),
    "embedding of a stack": lambda o: o.embedding(IDS, STACK, "q4_0", torch.float32),
    "embedding to integers": lambda o: o.embedding(IDS, Q4, "q4_0", torch.int8),
    "linear with a stack": lambda o: o.linear(X, STACK, "q4_0"),
    "linear with integer x": lambda o: o.linear(X.long(), Q4, "q4_0"),
    "linear with other columns": lambda o: o.linear(X[:, :100], Q4, "q4_0"),
    "linear with a number": lambda o: o.linear(torch.tensor(1.0), Q4, "q4_0"),
    "linear with another bias": lambda o: o.linear(X, Q4, "q4_0", torch.zeros(7)),
    "linear with integer bias": lambda o: o.linear(X, Q4, "q4_0", torch.zeros(8, dtype=torch.int)),
    "experts of a matrix": lambda o: o.experts_linear(X, Q4, "q4_0", IDS),
    "experts of integers": lambda o: o.experts_linear(X.int(), STACK, "q4_0", IDS),
    "experts with float ids": lambda o: o.experts_linear(X, STACK, "q4_0", IDS.float()),
    "experts with flat ids": lambda o: o.experts_linear(X, STACK, "q4_0", IDS[0]),
    "experts with other tokens": lambda o: o.experts_linear(X[:1], STACK, "q4_0", IDS),
    "experts with another bias": lambda o: o.experts_linear(X, STACK, "q4_0", IDS, torch.zeros(2, 3)),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=list(MISUSES))
def test_faults_are_those_of_the_cpu(gpu: Any, misuse: Callable[[Any], object]) -> None:
    said = []
    for namespace in (torch.ops.isqtorch, gpu):
        with pytest.raises(ValueError) as caught:
            misuse(namespace)
        assert type(caught.value) is ValueError
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_an_unknown_format_lists_those_that_exist(gpu: Any) -> None:
    with pytest.raises(ValueError, match='linear: no CUDA kernels for the format "q7z"..*q4_0, .*fp8'):
        gpu.linear(X, Q4, "q7z")
