"""Misuse of the operators: native kernels, reference and shapes for tracing refuse the same, in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from feedback_faults import FEEDBACK_FAULTS, poisoned
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import isqtorch
from isqtorch import ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


packed_q4k = torch.zeros(6, 144, dtype=torch.uint8)
stack_q4k = torch.zeros(2, 6, 144, dtype=torch.uint8)
huge = torch.empty(0, 84 << 56, dtype=torch.uint8)  # as many weights as 2**64: zero, if one forgets to look
VALUES = ("nan", "inf", "-inf", "f16 overflow", "importance negative", "importance huge", "id ", "factor's ", "carried")
"""Beginnings of the names of faults that are in the values, of which tracing knows nothing."""


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
    "importance in float8": (
        ValueError,
        "importance must be a float tensor, got",
        lambda o: o.quantize(torch.ones(2, 64), "afq4", torch.ones(64).to(torch.float8_e4m3fn)),
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
    "bias of another type": (
        ValueError,
        "bias must be one of.*got float64",
        lambda o: o.linear(torch.ones(3, 256), packed_q4k, "q4k", torch.ones(6).double()),
    ),
    "format with a NUL": (
        ValueError,
        r'linear: no kernels for the format "q4k\?x"|linear: no CPU kernels for the format "q4k\?x"',
        lambda o: o.linear(torch.ones(3, 256), packed_q4k, "q4k\0x"),
    ),
    "alias of a format": (
        ValueError,
        'kernels for the format "Q4_K"',
        lambda o: o.dequantize(packed_q4k, "Q4_K", torch.float32),
    ),
    "importance huge": (
        ValueError,
        r"importance\[7\] is 3e\+38; importance must be finite, not negative and at most 2\*\*40",
        lambda o: o.quantize(torch.ones(2, 256), "q6k", one_large(3e38)),
    ),
    "importance huge, of no use to the rule": (
        ValueError,
        r"importance\[7\] is inf;",
        lambda o: o.quantize(torch.ones(2, 256), "afq4", one_large(1e300)),
    ),
    "rows too long": (
        ValueError,
        r"q2k: a packed row must not have more than 2\*\*40 weights",
        lambda o: o.linear(torch.zeros(2, 0), huge, "q2k"),
    ),
    "rows of a table too long": (
        ValueError,
        r"q2k: a packed row must not have more than 2\*\*40 weights",
        lambda o: o.embedding(torch.zeros(0, dtype=torch.int64), huge, "q2k", torch.float32),
    ),
    "in_features too large": (
        ValueError,
        r"q8_1: in_features must not be more than 2\*\*40",
        lambda o: o.quantize(torch.empty(0, 1 << 62), "q8_1"),
    ),
    "rows that overflow with the columns": (
        ValueError,
        "is larger than any memory",
        lambda o: o.quantize(torch.empty(0, 1, 256).expand(0, 1 << 56, 256), "q8_0"),
    ),
    "result that overflows": (
        ValueError,
        "is larger than any memory",
        lambda o: o.embedding(torch.empty(0, 1 << 60, dtype=torch.int64), packed_q4k, "q4k", torch.float32),
    ),
    "packed row of no bytes": (
        ValueError,
        "multiple of 144 bytes, got 0",
        lambda o: o.dequantize(packed_q4k[:, :0], "q4k", torch.float32),
    ),
    "id of an expert": (
        IndexError,
        r"experts_linear: ids\[1, 0\] is 3, but the weight has 2 experts, 0 to 1\.",
        lambda o: o.experts_linear(torch.ones(2, 256), stack_q4k, "q4k", torch.tensor([[2], [3]])),
    ),
    "id of an expert, without rows": (
        IndexError,
        r"experts_linear: ids\[0, 0\] is -1",
        lambda o: o.experts_linear(torch.ones(1, 256), stack_q4k[:, :0], "q4k", torch.tensor([[-1]])),
    ),
    "ids of experts in int16": (
        ValueError,
        r"ids must be int64 or int32 \[T, S\], got int16",
        lambda o: o.experts_linear(torch.ones(1, 256), stack_q4k, "q4k", torch.zeros(1, 1, dtype=torch.int16)),
    ),
    "x of experts": (
        ValueError,
        r"x must be \[1, 256\].*got shape \[2, 256\]",
        lambda o: o.experts_linear(torch.ones(2, 256), stack_q4k, "q4k", torch.zeros(1, 1, dtype=torch.int64)),
    ),
    "id of an expert, backward": (
        IndexError,
        r"experts_linear_dx: ids\[0, 1\] is 9, but the weight has 2 experts, 0 to 1\.",
        lambda o: o.experts_linear_dx(torch.ones(1, 2, 6), stack_q4k, "q4k", torch.tensor([[0, 9]])),
    ),
    "dy of experts": (
        ValueError,
        r"experts_linear_dx: dy must be \[1, 2, 6\]",
        lambda o: o.experts_linear_dx(torch.ones(1, 2, 5), stack_q4k, "q4k", torch.tensor([[0, 1]])),
    ),
    "dy of bytes": (
        ValueError,
        "experts_linear_dx: dy must be one of",
        lambda o: o.experts_linear_dx(torch.ones(1, 2, 6).byte(), stack_q4k, "q4k", torch.tensor([[0, 1]])),
    ),
    "squares of nothing": (ValueError, "x must have columns, got shape", lambda o: o.square_sums(torch.ones(3, 0))),
    "no groups": (ValueError, "count must be positive, got 0", lambda o: o.square_sums(torch.ones(3, 2), None, 0)),
    "count that overflows": (
        ValueError,
        "is larger than any memory",
        lambda o: o.square_sums(torch.ones(3, 4), None, 2**63 - 1),
    ),
    "groups of another length": (
        ValueError,
        r"groups must have shape \[3, slots\], got \[2, 1\]",
        lambda o: o.square_sums(torch.ones(3, 2), torch.zeros(2, 1, dtype=torch.int64), 1),
    ),
    "groups of floats": (
        ValueError,
        "groups must be int64 or int32, got float32",
        lambda o: o.square_sums(torch.ones(3, 2), torch.zeros(3, 1), 1),
    ),
    "squares of doubles": (ValueError, "x must be one of", lambda o: o.square_sums(torch.ones(3, 2).double())),
    "ids float": (
        ValueError,
        "ids must be int64 or int32, got float32",
        lambda o: o.embedding(torch.tensor([1.0]), packed_q4k, "q4k", torch.float32),
    ),
    **FEEDBACK_FAULTS,
}


def negative_at_3() -> torch.Tensor:
    v = torch.ones(32)
    v[3] = -0.5
    return v


def one_large(value: float) -> Tensor:
    v = torch.ones(256, dtype=torch.float64)
    v[7] = value
    return v


class Native:
    """All operators, also those that the package `ops` does not name."""

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        return getattr(torch.ops.isqtorch, op)


class Traced:
    """The operators on meta tensors: their shapes without their values."""

    def __getattr__(self, op: str) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            return getattr(torch.ops.isqtorch, op)(*tree_map_only(Tensor, lambda t: t.to("meta"), arguments))

        return call


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_all_implementations(name: str) -> None:
    kind, pattern, call = FAULTS[name]
    messages = []
    for o in (ops.reference, Native(), *[Traced()] * (not name.startswith(VALUES))):
        with pytest.raises(kind, match=pattern) as caught:
            call(o)
        messages.append(
            str(caught.value).replace("no CPU kernels", "no kernels").replace("float8_e4m3fn", "another type")
        )
    if not name.startswith("K "):  # those name a way out that only the registry knows
        assert len(set(messages)) == 1


def test_a_long_name_of_a_format_makes_no_long_message() -> None:
    for o in (ops.reference, Native(), Traced()):
        with pytest.raises(ValueError) as caught:
            o.linear(torch.ones(3, 256), packed_q4k, "q" * 1_000_000)
        assert len(str(caught.value)) < 2000


X = torch.ones(2, 256)
IDS = torch.zeros(2, 1, dtype=torch.int64)
CALLS: dict[str, tuple[Any, ...]] = {
    "linear": (X, packed_q4k, "q4k", torch.ones(6)),
    "linear_frozen": (X, packed_q4k, "q4k", torch.ones(6)),
    "linear_w8a8": (X, torch.zeros(6, 264, dtype=torch.uint8), "fp8", torch.ones(6)),
    "experts_linear": (X, stack_q4k, "q4k", IDS, torch.ones(2, 6)),
    "experts_linear_dx": (torch.ones(2, 1, 6), stack_q4k, "q4k", IDS),
    "embedding": (IDS, packed_q4k, "q4k", torch.float32),
    "square_sums": (X, IDS, 2),
    "quantize_feedback": (X, "q4k", torch.eye(256), torch.ones(256)),
}
"""Calls that are right, of the operators with several tensors."""


@pytest.mark.parametrize(
    ("op", "at"),
    [(op, i) for op, call in CALLS.items() for i, argument in enumerate(call) if isinstance(argument, Tensor)],
)
def test_one_tensor_on_the_meta_device(op: str, at: int) -> None:
    """An answer would be memory that nobody wrote."""
    call = getattr(torch.ops.isqtorch, op)
    wanted = call(*CALLS[op])
    arguments = list(CALLS[op])
    arguments[at] = arguments[at].to("meta")
    with pytest.raises(ValueError, match=r"(is|are) on (meta|cpu), .* on (meta|cpu)\. Move one of them"):
        call(*arguments)
    traced = getattr(Traced(), op)(*CALLS[op])
    assert traced.device.type == "meta" and traced.shape == wanted.shape and traced.dtype == wanted.dtype


def test_importance_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match="importance is on meta, the weight on cpu"):
        ops.quantize(torch.ones(2, 256), "q4k", torch.ones(256, device="meta"))


EMPTY = {
    "no rows of x": lambda o: o.linear(torch.ones(0, 256), packed_q4k, "q4k"),
    "no rows of the weight": lambda o: o.linear(torch.ones(3, 2, 256), packed_q4k[:0], "q4k", torch.ones(0)),
    "no experts": lambda o: o.experts_linear(X, stack_q4k[:0], "q4k", IDS),
    "more experts than can be counted, of no rows": lambda o: o.experts_linear(
        X, torch.empty(1 << 50, 0, 144, dtype=torch.uint8), "q4k", IDS
    ),
    "the same, with narrow ids": lambda o: o.experts_linear(
        X, torch.empty(1 << 50, 0, 144, dtype=torch.uint8), "q4k", IDS.int() + 1
    ),
    "no slots": lambda o: o.experts_linear(X, stack_q4k, "q4k", IDS[:, :0]),
    "no slots, backward": lambda o: o.experts_linear_dx(torch.ones(2, 0, 6), stack_q4k, "q4k", IDS[:, :0]),
    "no ids": lambda o: o.embedding(IDS[:0], packed_q4k[:0], "q4k", torch.float16),
    "no matrices": lambda o: o.quantize(torch.ones(0, 5, 256), "q4k", torch.ones(256)),
    "many matrices of no rows": lambda o: o.quantize(torch.empty(1 << 30, 0, 256), "q4k", torch.ones(256)),
    "no matrices, hqq": lambda o: o.quantize(torch.ones(2, 0, 5, 256), "hqq4"),
    "no bytes": lambda o: o.dequantize(stack_q4k[:, :0], "q4k", torch.bfloat16),
    "no rows to square": lambda o: o.square_sums(torch.ones(0, 4), None, 3),
    "no slots to square": lambda o: o.square_sums(torch.ones(2, 4), IDS[:, :0], 3),
}


@pytest.mark.parametrize("name", EMPTY)
def test_sizes_of_zero(name: str) -> None:
    native, reference, traced = (EMPTY[name](o) for o in (Native(), ops.reference, Traced()))
    assert native.shape == reference.shape == traced.shape
    assert native.dtype == reference.dtype == traced.dtype
    assert torch.equal(native, reference)


def test_unknown_format_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="q9k.*q4_0.*afq4"):
        ops.quantize(torch.ones(2, 256), "q9k")


@pytest.mark.parametrize("value", [2e12, 1e25, 3e38])
def test_huge_importance_leaves_the_model_as_it_was(value: float) -> None:
    model = nn.Sequential(nn.Linear(256, 4), nn.Linear(4, 256), nn.Linear(256, 4))
    importance = {"0": torch.ones(256), "2": one_large(value)}
    with pytest.raises(ValueError, match=r"layer '2' has importance .*more than 2\*\*40"):
        isqtorch.quantize_(model, "q6k", imatrix=importance, fallback="skip", progress=False)
    assert all(type(layer) is nn.Linear for layer in model)
