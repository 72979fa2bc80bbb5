"""The CUDA kernels of `experts_linear`, in the emulator: few and many (token, slot) pairs, any distribution of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from emulator import kernels
from helpers import ALL_FORMATS, DTYPES, ROUNDING, rounded_weights
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format

every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
N, EXPERTS = 19, 5
FEW, MANY = 5, 23  # tokens with three slots: below and above what is multiplied pair by pair
BEYOND_ROUNDING = {torch.float32: 5e-5, torch.float16: 2e-4, torch.bfloat16: 2e-4}
"""What a product may add to the rounding of its output; see test_cuda_linear.py."""


@cache
def packed_experts(fmt: QuantFormat, experts: int, n: int, k: int) -> Tensor:
    """[experts, n, row_bytes]"""
    w = torch.randn(experts * n, k, generator=torch.Generator().manual_seed(1))
    return ops.quantize(w, fmt.name).view(experts, n, -1)


def some_ids(tokens: int, slots: int, experts: int, kind: str = "any") -> Tensor:
    """Which experts: "any", with empty ones; "one" for all pairs; "absent" ones among others; or "nobody"."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, experts, (tokens, slots), generator=generator)
    if kind == "any":
        ids[ids == 1] = 0
    elif kind == "one":
        ids[:] = experts - 1
    elif kind == "absent":
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = experts
    else:
        ids[:] = experts
    return ids


def run(fmt: QuantFormat, x: Tensor, packed: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """[tokens, slots, n]; the workspace ends where memory ends too."""
    (experts, n, _), (tokens, slots) = packed.shape, ids.shape
    with kernels.Memory() as memory:
        y = memory.new((tokens, slots, n), x.dtype, "y")
        job = {
            "x": memory.put(x, "x"),
            "rows_per_slot": x.dim() == 3,
            "weight": memory.put(packed, "weight", align=kernels.facts(fmt.name)["align"]),
            "bias": None if bias is None else memory.put(bias, "bias", align=2),
            "ids": memory.put(ids, "ids"),
            "wide_ids": ids.dtype == torch.int64,
            "y": y,
            "dtype": x.dtype,
            "tokens": tokens,
            "slots": slots,
            "experts": experts,
            "n": n,
            "k": x.shape[-1],
        }
        size = kernels.run("experts_workspace", fmt.name, **job)
        kernels.run("experts", fmt.name, workspace=memory.new((size,), torch.uint8, "workspace"), **job)
        return y.clone()


def check(fmt: QuantFormat, x: Tensor, packed: Tensor, ids: Tensor, bias: Tensor | None = None) -> None:
    y = run(fmt, x, packed, ids, bias).double()
    # Few pairs are multiplied with the weights as they are, many with weights rounded to x's type.
    few = ids.numel() <= max(packed.shape[0], 16)
    of_experts = rounded_weights(packed, fmt, torch.float32 if few else x.dtype)
    w, undecided = (
        torch.cat([each, torch.zeros_like(each[:1])])[ids.long()] for each in of_experts
    )  # [tokens, slots, n, k]
    rows = x.double() if x.dim() == 3 else x.double()[:, None].expand(*ids.shape, -1)
    exact = torch.einsum("tsnk,tsk->tsn", w, rows)
    margin = torch.einsum("tsnk,tsk->tsn", undecided, rows.abs())
    typical = w.norm(dim=-1) * rows.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    if bias is not None:
        exact += torch.cat([bias.double(), torch.zeros_like(bias[:1]).double()])[ids.long()]
    assert not y.isnan().any()
    assert (y[ids == packed.shape[0]] == 0).all()
    error = (y - exact).abs() - ROUNDING[x.dtype] * exact.abs() - margin
    assert (error <= 4 * BEYOND_ROUNDING[x.dtype] * typical).all(), float((error / typical).nan_to_num().max())


def activations(tokens: int, k: int, dtype: torch.dtype, slots: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn((tokens, slots, k) if slots else (tokens, k), generator=generator).to(dtype)


def check_some(
    fmt: QuantFormat, tokens: int, kind: str, k: int, dtype: torch.dtype, own_rows: bool, wide: bool
) -> None:
    packed = packed_experts(fmt, EXPERTS, N, k)
    ids = some_ids(tokens, 3, EXPERTS, kind).to(torch.int64 if wide else torch.int32)
    bias = torch.randn(EXPERTS, N, generator=torch.Generator().manual_seed(5)).to(dtype) if own_rows else None
    check(fmt, activations(tokens, k, dtype, 3 if own_rows else 0), packed, ids, bias)


@every_variant
def test_every_format(fmt: QuantFormat) -> None:
    dtype = DTYPES[len(fmt.name) % 3]
    check_some(fmt, FEW, "absent", 3 * fmt.block, dtype, own_rows=True, wide=False)
    check_some(fmt, MANY, "any", fmt.block, dtype, own_rows=False, wide=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_variant
def test_all_of_every_format(fmt: QuantFormat, dtype: torch.dtype) -> None:
    for tokens in (1, FEW, MANY, 70):
        for kind in ("any", "one", "absent"):
            for own_rows in (False, True):
                k = fmt.block * (1 + 1024 // fmt.block)
                check_some(fmt, tokens, kind, k, dtype, own_rows, wide=own_rows)


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("own_rows", [False, True], ids=["shared", "per-slot"])
@pytest.mark.parametrize("kind", ["any", "one", "absent", "nobody"])
@pytest.mark.parametrize("tokens", [1, FEW, MANY, 60])
def test_any_distribution(tokens: int, kind: str, own_rows: bool, wide: bool) -> None:
    check_some(get_format("q4_0"), tokens, kind, 64, torch.bfloat16, own_rows, wide)


@pytest.mark.parametrize("order", list(kernels.ORDERS))
@pytest.mark.parametrize("late", [True, False], ids=["late", "eager"])
def test_any_schedule(order: str, late: bool) -> None:
    with kernels.schedule(order, late_copies=late, seed=5):
        for tokens in (FEW, MANY):
            check_some(get_format("afq4g32"), tokens, "absent", 288, torch.float16, True, True)


def test_more_experts_than_tokens() -> None:
    """As many pairs as go one by one, in blocks of 32 rows; then one more."""
    fmt = get_format("q5_0")
    packed = packed_experts(fmt, 70, 33, 96)
    for tokens in (70, 71):
        check(fmt, activations(tokens, 96, torch.float16), packed, some_ids(tokens, 1, 70))


def test_more_pairs_than_threads_sort() -> None:
    fmt = get_format("q8_0")
    packed = packed_experts(fmt, 3, 2, 32)
    check(fmt, activations(700, 32, torch.bfloat16), packed, some_ids(700, 2, 3, "absent"))


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("bad", [-1, EXPERTS + 1])
def test_an_id_that_names_no_expert(tokens: int, bad: int) -> None:
    fmt = get_format("q4_0")
    ids = some_ids(tokens, 3, EXPERTS)
    ids[tokens // 2, 1] = bad
    with pytest.raises(kernels.KernelError, match="an id names no expert"):
        run(fmt, activations(tokens, 32, torch.float32), packed_experts(fmt, EXPERTS, N, 32), ids)


def test_nothing_to_do() -> None:
    fmt = get_format("q4_0")
    packed = packed_experts(fmt, EXPERTS, N, 32)
    for shape in ((0, 3), (4, 0)):
        y = run(fmt, torch.randn(shape[0], 32), packed, torch.zeros(shape, dtype=torch.int64))
        assert y.shape == (*shape, N)


@pytest.mark.parametrize("tokens", [2, MANY])
def test_tiny(tokens: int) -> None:
    """What the sanitizers run."""
    check_some(get_format("q4_0"), tokens, "absent", 288, torch.bfloat16, False, True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitized(variant: str) -> None:
    kernels.sanitized_pytest(variant, "tests/test_cuda_experts.py", "-k", "test_tiny")
