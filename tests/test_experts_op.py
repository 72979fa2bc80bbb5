"""experts_linear: every format and level against the reference, with the shapes and routings that experts meet."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers import ALL_FORMATS, DTYPES, FORMATS, ROUNDING, before_a_guard_page, implementation, weight
from torch import Tensor
from torch.library import opcheck

from isqtorch import ops
from isqtorch.formats import QuantFormat

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
EXPERTS = 5


@cache
def packed_experts(fmt: QuantFormat, rows: int = 37, blocks: int = 3, experts: int = EXPERTS) -> Tensor:
    return torch.stack([ops.quantize(weight(fmt, rows, blocks, seed=e), fmt.name) for e in range(experts)])


def error(y: Tensor, x: Tensor, packed: Tensor, fmt: QuantFormat, ids: Tensor) -> float:
    """RMS error of y [T, S, N] relative to the size that outputs have for random signs, as in helpers.LinearCase."""
    w = ops.reference.dequantize(packed, fmt.name, torch.float32).double()
    w = torch.cat([w, torch.zeros_like(w[:1])])[ids.long()]  # [T, S, N, K]
    rows = (x if x.ndim == 3 else x[:, None]).expand(*ids.shape, -1).double()
    exact = torch.einsum("tsnk,tsk->tsn", w, rows)
    typical = (rows.norm(dim=-1, keepdim=True) * w.norm(dim=-1)).norm() / w.shape[-1] ** 0.5
    assert (y[ids == packed.shape[0]] == 0).all()
    return float((y.double() - exact).norm() / typical) if y.numel() else 0.0


def routing(tokens: int, slots: int, kind: str = "random") -> Tensor:
    generator = torch.Generator().manual_seed(tokens + 100 * slots)
    if kind == "one expert":
        return torch.full((tokens, slots), 3)
    if kind == "skewed":  # one expert with many tokens, one with a few, one with none
        ids = torch.full((tokens, slots), 1)
        ids[:3, 0] = EXPERTS - 1
        return ids
    return torch.randint(0, EXPERTS + 1, (tokens, slots), generator=generator)  # EXPERTS: not here


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
def test_agrees_with_the_reference_on_every_level(fmt: QuantFormat, isa: str) -> None:
    packed = packed_experts(fmt)
    cases = (
        (1, 4, "random"),
        (6, 2, "random"),
        (40, 3, "skewed"),
        (7, 1, "one expert"),
        (5, 3, "one expert"),
        (29, 1, "one expert"),
    )
    for tokens, slots, kind in cases:
        ids = routing(tokens, slots, kind)
        generator = torch.Generator().manual_seed(tokens)
        for shape in ((tokens, packed.shape[-1]), (tokens, slots, packed.shape[-1])):
            x = torch.randn(*shape[:-1], 3 * fmt.block, generator=generator)
            y = ops.experts_linear(x, packed, fmt.name, ids)
            assert y.shape == (tokens, slots, 37) and error(y, x, packed, fmt, ids) <= fmt.linear_error


def test_a_row_is_that_of_linear_with_its_expert(fmt: QuantFormat) -> None:
    """One token: the very kernel that linear has for one row."""
    packed = packed_experts(fmt)
    x, ids = torch.randn(1, 3 * fmt.block), torch.tensor([[4, 0, 2]])
    y = ops.experts_linear(x, packed, fmt.name, ids)
    for slot, expert in enumerate(ids[0].tolist()):
        assert torch.equal(y[:, slot], ops.linear(x, packed[expert], fmt.name))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["random", "one expert", "skewed"])
def test_dtypes_bias_and_routings(fmt: QuantFormat, dtype: torch.dtype, kind: str) -> None:
    packed = packed_experts(fmt, rows=33, blocks=2)
    bias = torch.randn(EXPERTS, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    padded = torch.cat([bias, torch.zeros_like(bias[:1])])
    for tokens, slots in ((5, 1), (23, 4)):
        ids = routing(tokens, slots, kind).int()
        x = torch.randn(tokens, slots, 2 * fmt.block, generator=torch.Generator().manual_seed(2)).to(dtype)
        y = ops.experts_linear(x, packed, fmt.name, ids, bias)
        want = ops.reference.experts_linear(x, packed, fmt.name, ids, bias)
        assert y.dtype == dtype == want.dtype
        assert (
            error(y.double() - padded[ids.long()].double(), x, packed, fmt, ids) <= fmt.linear_error + ROUNDING[dtype]
        )
        assert error(want.double() - padded[ids.long()].double(), x, packed, fmt, ids) <= 2 * ROUNDING[dtype] + 1e-6


def test_empty_tensors_and_no_expert_here(fmt: QuantFormat) -> None:
    packed, k = packed_experts(fmt, rows=4, blocks=1), fmt.block
    none = torch.zeros(0, 2, dtype=torch.int64)
    for implementation_name in ("reference", "native"):
        run = implementation(implementation_name).experts_linear
        assert run(torch.empty(0, k), packed, fmt.name, none).shape == (0, 2, 4)
        assert run(torch.empty(3, k), packed, fmt.name, none.view(0, 2)[:0].new_zeros(3, 0)).shape == (3, 0, 4)
        assert run(torch.ones(2, k), packed[:, :0], fmt.name, torch.zeros(2, 1, dtype=torch.int64)).shape == (2, 1, 0)
        nobody = torch.full((2, 3), EXPERTS)
        bias = torch.ones(EXPERTS, 4)
        assert torch.equal(run(torch.ones(2, k), packed, fmt.name, nobody, bias), torch.zeros(2, 3, 4))
        assert torch.equal(run(torch.ones(2, k), packed[:0], fmt.name, nobody * 0), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
def test_nothing_is_read_beyond_the_end(fmt: QuantFormat, isa: str) -> None:
    packed = packed_experts(fmt, rows=3, blocks=3, experts=2)
    for tokens in (1, 20):
        ids = torch.ones(tokens, 1, dtype=torch.int64)
        x = torch.randn(tokens, 3 * fmt.block)
        want = ops.experts_linear(x, packed, fmt.name, ids)
        for gap in (0, 1):
            got = ops.experts_linear(before_a_guard_page(x), before_a_guard_page(packed, gap), fmt.name, ids)
            assert torch.equal(got, want)


def test_strides_threads_and_large_batches(fmt: QuantFormat) -> None:
    """More rows of x for an expert than the panels take at once, columns in several stretches, rows in several tiles."""
    blocks = -(-1200 // fmt.block)
    packed = packed_experts(fmt, rows=70, blocks=blocks, experts=2)
    ids = (torch.arange(1300) % 11 == 0).long()[:, None].repeat(1, 2)
    x = torch.randn(blocks * fmt.block, 1300).t()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(ops.experts_linear(x, packed, fmt.name, ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    for expert in range(2):
        y = results[0][ids == expert]  # both slots of the tokens, one after the other
        rows = x[ids[:, 0] == expert].repeat_interleave(2, 0)
        want = ops.reference.linear(rows, packed[expert], fmt.name)
        assert float((y - want).norm() / want.norm()) <= fmt.linear_error
    apart = torch.stack([packed, packed], 1)[:, 0]  # not contiguous
    assert torch.equal(ops.experts_linear(x, apart, fmt.name, ids), results[0])


# ---- tracing and gradients -----------------------------------------------------------------------------------------------


def arguments(fmt: QuantFormat, shared: bool) -> tuple[Any, ...]:
    x = torch.randn(*((3,) if shared else (3, 2)), fmt.block, requires_grad=True)
    packed = packed_experts(fmt, rows=6, blocks=1)
    return x, packed, fmt.name, routing(3, 2), torch.randn(EXPERTS, 6, requires_grad=True)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_schema_autograd_and_fakes(fmt: QuantFormat, shared: bool) -> None:
    x, packed, name, ids, bias = arguments(fmt, shared)
    basic = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.isqtorch.experts_linear.default, (x, packed, name, ids, bias), test_utils=basic)
    opcheck(torch.ops.isqtorch.experts_linear.default, (x, packed, name, ids), test_utils=basic)
    dy = torch.randn(3, 2, 6)
    opcheck(torch.ops.isqtorch.experts_linear_dx.default, (dy, packed, name, ids), test_utils=basic)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_traces_through_autograd(shared: bool) -> None:
    for name in ("q4k", "q8_0"):
        fmt = next(f for f in FORMATS if f.name == name)
        opcheck(
            torch.ops.isqtorch.experts_linear.default, arguments(fmt, shared), test_utils="test_aot_dispatch_dynamic"
        )


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gradients_are_those_of_the_reference(fmt: QuantFormat, shared: bool) -> None:
    x, packed, name, ids, bias = arguments(fmt, shared)
    dy = torch.randn(3, 2, 6)
    grads = []
    w = torch.cat([ops.dequantize(packed, name, torch.float32), torch.zeros(1, 6, fmt.block)])[ids]
    for y in (
        ops.experts_linear(x, packed, name, ids, bias),
        torch.einsum("tsnk,tsk->tsn", w, (x[:, None] if shared else x).expand(3, 2, -1))
        + torch.cat([bias, torch.zeros(1, 6)])[ids],
    ):
        grads.append(torch.autograd.grad(y, (x, bias), dy))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


# ---- misuse: both implementations refuse the same, in the same words --------------------------------------------------------

packed_q4k = torch.zeros(3, 6, 144, dtype=torch.uint8)
one = torch.zeros(2, 1, dtype=torch.int64)
x_q4k = torch.ones(2, 256)
FAULTS: dict[str, tuple[type[Exception], str, Any]] = {
    "weight a matrix": (ValueError, r"3 dimensions.*\[6, 144\]", (x_q4k, packed_q4k[0], "q4k", one)),
    "weight cut": (ValueError, "multiple of 144 bytes, got 100", (x_q4k, packed_q4k[..., :100], "q4k", one)),
    "weight type": (ValueError, "packed weight is uint8, got int8", (x_q4k, packed_q4k.char(), "q4k", one)),
    "x of bytes": (ValueError, "x must be one of.*uint8", (x_q4k.byte(), packed_q4k, "q4k", one)),
    "x too short": (
        ValueError,
        r"x must be \[2, 256\].*\[2, 1, 256\].*got shape \[2, 255\]",
        (x_q4k[:, 1:], packed_q4k, "q4k", one),
    ),
    "x for other tokens": (ValueError, r"got shape \[1, 256\]", (x_q4k[:1], packed_q4k, "q4k", one)),
    "x for other slots": (ValueError, r"got shape \[2, 2, 256\]", (torch.ones(2, 2, 256), packed_q4k, "q4k", one)),
    "ids of floats": (
        ValueError,
        r"int64 or int32 \[T, S\], got float32 \[2, 1\]",
        (x_q4k, packed_q4k, "q4k", one.float()),
    ),
    "ids a vector": (ValueError, r"got int64 \[2\]", (x_q4k, packed_q4k, "q4k", one[:, 0])),
    "id too large": (
        IndexError,
        r"ids\[1, 0\] is 4, but the weight has 3 experts, 0 to 2\. .*; 3 marks an expert that another process holds",
        (x_q4k, packed_q4k, "q4k", one + torch.tensor([[0], [4]])),
    ),
    "id negative": (IndexError, r"ids\[0, 0\] is -1", (x_q4k, packed_q4k, "q4k", one - 1)),
    "bias shape": (
        ValueError,
        r"bias must have shape \[3, 6\], got \[6\]",
        (x_q4k, packed_q4k, "q4k", one, torch.ones(6)),
    ),
    "bias type": (
        ValueError,
        "bias must be one of.*int64",
        (x_q4k, packed_q4k, "q4k", one, torch.ones(3, 6, dtype=torch.int64)),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_both_implementations(name: str) -> None:
    kind, pattern, arguments = FAULTS[name]
    messages = []
    for implementation_name in ("reference", "native"):
        with pytest.raises(kind, match=pattern) as caught:
            implementation(implementation_name).experts_linear(*arguments)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
