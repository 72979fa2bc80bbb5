"""The operators of a decoding step: bits of torch, bounds of attention, faults, tracing, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import every_dtype
from torch import Tensor
from torch.library import opcheck

from isqtorch import ops
from isqtorch.ops import steps

native = torch.ops.isqtorch
LANES = next(  # of torch's sums on this machine
    lanes
    for lanes in (8, 4, 16)
    if torch.equal(
        native.step_norm(x := torch.linspace(-3, 5, 8 * 1000).view(8, 1000).sin(), x[0], 1e-5, 0, lanes),
        steps.step_norm(x, x[0], 1e-5, 0, lanes),
    )
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def packed(rows: int, columns: int, fmt: str) -> Tensor:
    result: Tensor = ops.quantize(torch.randn(rows, columns) * columns**-0.5, fmt)
    return result


@every_dtype
@pytest.mark.parametrize("style", range(3))
@pytest.mark.parametrize("columns", [8, 64, 100, 576, 1111, 2048, 4096, 9000])
def test_norm_has_the_bits_of_torch(columns: int, style: int, dtype: torch.dtype, isa: str) -> None:
    x, weight = (3 * torch.randn(5, 2, columns)).to(dtype), torch.randn(columns).to(dtype)
    expected = steps.step_norm(x, weight, 1e-5, style, LANES)
    assert torch.equal(native.step_norm(x, weight, 1e-5, style, LANES), expected)
    turned = x.transpose(0, 1)
    assert torch.equal(native.step_norm(turned, weight, 1e-5, style, LANES), expected.transpose(0, 1))


def test_a_norm_of_nothing_and_of_large_numbers() -> None:
    weight = torch.ones(64)
    assert native.step_norm(torch.zeros(0, 64), weight, 1e-5, 0, LANES).shape == (0, 64)
    x = torch.full((2, 64), 1e30)
    x[1] = 0
    assert torch.equal(
        native.step_norm(x, weight, 0.0, 0, LANES).nan_to_num(7),
        steps.step_norm(x, weight, 0.0, 0, LANES).nan_to_num(7),
    )


@every_dtype
def test_gate_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    if ops.cpu_info().isa_of_formats == "baseline":
        pytest.skip("the baseline has no fused multiply-add, which torch uses")
    gate = torch.cat((torch.linspace(-130, 130, 1 << 14), torch.linspace(-9, 9, 1 << 14))).to(dtype).view(16, -1)
    up = torch.randn(gate.shape).to(dtype)
    assert torch.equal(native.step_gate(torch.cat((gate, up), -1)), steps.step_gate(torch.cat((gate, up), -1)))


@every_dtype
def test_gate_of_any_width(dtype: torch.dtype, isa: str) -> None:
    for width in (1, 3, 17, 50):
        x = (4 * torch.randn(3, 2 * width)).to(dtype)
        expected = steps.step_gate(x.float())
        torch.testing.assert_close(native.step_gate(x).float(), expected, rtol=2 * TOLERANCE[dtype], atol=1e-6)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -200.0, 0.0, 200.0]).to(dtype)
    x = torch.cat((special, torch.ones_like(special)))
    assert torch.equal(native.step_gate(x).nan_to_num(7), steps.step_gate(x).nan_to_num(7))


@every_dtype
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 70])
def test_linears_are_the_products_side_by_side(rows: int, dtype: torch.dtype, isa: str) -> None:
    x, norm = torch.randn(rows, 1, 512).to(dtype), torch.randn(512).to(dtype)
    formats = ["q4k", "q8_0", "afq4"]
    weights = [packed(n, 512, fmt) for n, fmt in zip((192, 64, 33), formats, strict=True)]
    biases = [None, torch.randn(64).to(dtype), None]
    for weight in (None, norm):
        arguments = (x, weights, formats, biases, weight, 1e-5, 0, LANES, False)
        assert torch.equal(native.step_linears(*arguments), steps.step_linears(*arguments))
    arguments = (x, weights[:1] * 2, formats[:1] * 2, [None, None], norm, 1e-6, 2, LANES, True)
    expected = steps.step_linears(*arguments)
    torch.testing.assert_close(native.step_linears(*arguments), expected, rtol=2 * TOLERANCE[dtype], atol=1e-6)


@every_dtype
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_linear_add_is_the_product_and_a_sum(rows: int, dtype: torch.dtype, isa: str) -> None:
    x, residual = torch.randn(rows, 256).to(dtype), torch.randn(rows, 96).to(dtype)
    weight, bias, norm = packed(96, 256, "q5k"), torch.randn(96).to(dtype), torch.randn(96).to(dtype)
    for given in (None, norm):
        arguments = (x, weight, "q5k", bias, residual, given, 1e-6, 2, LANES)
        assert torch.equal(native.step_linear_add(*arguments), steps.step_linear_add(*arguments))


@every_dtype
@pytest.mark.parametrize("sizes", [(1, 3, 3, 64, 64), (2, 1, 4, 256, 256), (3, 2, 1, 80, 32)], ids=str)
def test_heads_have_the_bits_of_torch(sizes: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    batch, heads, group, dim, turned = sizes
    x = torch.randn(batch, 1, heads * (group + 2) * dim).to(dtype)
    cos, sin = (torch.randn(rows, 1, turned).to(dtype) for rows in (batch, batch))
    caches = [torch.randn(batch, heads, 20, dim).to(dtype) for _ in range(2)]
    norms = [torch.randn(dim).to(dtype) for _ in range(2)]
    for given in ([None, None], norms):
        for angles in ((cos, sin), (cos[:1], sin[:1])):
            mine, theirs = [part.clone() for part in caches], [part.clone() for part in caches]
            q = native.step_heads(x, *angles, *mine, 13, *given, 1e-6, 0, LANES)
            assert torch.equal(q, steps.step_heads(x, *angles, *theirs, 13, *given, 1e-6, 0, LANES))
            assert all(map(torch.equal, mine, theirs))


@every_dtype
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("normed", [False, True])
def test_halves_of_a_layer_are_their_operators_one_after_the_other(
    batch: int, normed: bool, dtype: torch.dtype, isa: str
) -> None:
    heads, kv_heads, dim, inner = 4, 2, 32, 96
    x, weights = torch.randn(batch, 1, 64).to(dtype), [packed(n * dim, 64, "q8_0") for n in (heads, kv_heads, kv_heads)]
    products = (weights, ["q8_0"] * 3, [None, torch.randn(kv_heads * dim).to(dtype), None])
    norm, after = torch.randn(64).to(dtype), torch.randn(64).to(dtype) if normed else None
    of_heads = torch.randn(dim).to(dtype) if normed else None
    angles = [torch.randn(batch, 1, dim).to(dtype) for _ in range(2)]
    caches = [torch.randn(batch, kv_heads, 20, dim).to(dtype) for _ in range(2)]
    mask = torch.rand(batch, 1, 1, 12) < 0.5 if normed else None
    before, heads_rule, after_rule = (norm, 1e-5, 0, LANES), (1e-6, 1, LANES), (1e-4, 2, LANES)
    out, bias = packed(64, heads * dim, "q4_0"), torch.randn(64).to(dtype)

    mine, theirs = [part.clone() for part in caches], [part.clone() for part in caches]
    qkv = native.step_linears(x, *products, *before, False)
    q = native.step_heads(qkv, *angles, *theirs, 13, of_heads, of_heads, *heads_rule)
    y = native.step_attend(q, *theirs, 2, 14, 0.3, mask)
    expected = native.step_linear_add(y, out, "q4_0", bias, x, after, *after_rule)
    attention = (2, 14, of_heads, of_heads, *heads_rule, 0.3, mask)
    arguments = (*products, *before, *angles, *mine, *attention, out, "q4_0", bias, after, *after_rule)
    assert torch.equal(native.step_attention(x, *arguments), expected)
    assert all(map(torch.equal, mine, theirs)) and not torch.equal(mine[0], caches[0])
    torch.testing.assert_close(
        steps.step_attention(x, *arguments), expected, rtol=20 * TOLERANCE[dtype], atol=20 * TOLERANCE[dtype]
    )

    gate_up = ([packed(inner, 64, "q8_0") for _ in range(2)], ["q8_0"] * 2, [None, None], *before)
    down = packed(64, inner, "q8_0")
    y = native.step_linears(x, *gate_up, True)
    expected = native.step_linear_add(y, down, "q8_0", None, x, after, *after_rule)
    assert torch.equal(native.step_mlp(x, *gate_up, down, "q8_0", None, after, *after_rule), expected)
    torch.testing.assert_close(
        steps.step_mlp(x, *gate_up, down, "q8_0", None, after, *after_rule),
        expected,
        rtol=20 * TOLERANCE[dtype],
        atol=20 * TOLERANCE[dtype],
    )


@every_dtype
@pytest.mark.parametrize("columns", [1, 15, 130, 512, 513, 1300])
def test_attention_is_as_precise_as_its_type(columns: int, dtype: torch.dtype, isa: str) -> None:
    for batch, heads, group, dim in ((1, 3, 3, 64), (2, 1, 4, 256), (2, 2, 1, 20)):
        q = torch.randn(batch, heads * group, 1, dim).to(dtype)
        keys, values = (torch.randn(batch, heads, columns + 9, dim).to(dtype) for _ in range(2))
        mask = torch.rand(batch, 1, 1, columns) > 0.3
        mask[..., 0] = True
        for given in (None, mask, mask[:1]):
            y = native.step_attend(q, keys, values, 4, 4 + columns, dim**-0.5, given)
            expected = steps.step_attend(q, keys, values, 4, 4 + columns, dim**-0.5, given)
            torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_attention_does_not_depend_on_threads_or_padding() -> None:
    q, keys, values = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1300, 64), torch.randn(2, 2, 1300, 64)
    mask = torch.ones(2, 1, 1, 1300, dtype=torch.bool)
    mask[0, ..., :700] = False
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(native.step_attend(q, keys, values, 0, 1300, 0.1, mask))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = native.step_attend(q[:1], keys[:1], values[:1], 700, 1300, 0.1, None)
    assert torch.equal(results[0][:1], alone)


def test_what_sees_nothing_is_zero() -> None:
    q, keys, values = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 600, 8), torch.randn(1, 1, 600, 8)
    assert not native.step_attend(q, keys, values, 0, 600, 1.0, torch.zeros(1, 1, 1, 600, dtype=torch.bool)).any()


@pytest.mark.parametrize("module", [native, steps], ids=["native", "reference"])
def test_faults_are_named(module: Any) -> None:
    x, weight = torch.randn(2, 64), packed(32, 64, "q8_0")
    with pytest.raises(ValueError, match=r"step_norm: the weight of the norm must have shape \[64\], got \[32\]"):
        module.step_norm(x, torch.ones(32), 1e-5, 0, 8)
    with pytest.raises(ValueError, match="step_norm: the weight of the norm must have the type of x"):
        module.step_norm(x, torch.ones(64).half(), 1e-5, 0, 8)
    with pytest.raises(ValueError, match="step_norm: style must be 0, 1 or 2, got 3"):
        module.step_norm(x, torch.ones(64), 1e-5, 3, 8)
    with pytest.raises(ValueError, match="step_norm: lanes must be 4, 8 or 16, got 5"):
        module.step_norm(x, torch.ones(64), 1e-5, 0, 5)
    with pytest.raises(ValueError, match="step_gate: a gate and what it gates must be as wide as each other, got 63"):
        module.step_gate(x[:, :63])
    with pytest.raises(ValueError, match="lists of one length, and not empty; got 1, 2 and 1"):
        module.step_linears(x, [weight], ["q8_0", "q8_0"], [None], None, 0.0, 0, 8, False)
    with pytest.raises(ValueError, match="step_linear_add: the residual must be"):
        module.step_linear_add(x, weight, "q8_0", None, torch.ones(2, 31), None, 0.0, 0, 8)
    cache = torch.zeros(2, 1, 4, 16)
    angles = torch.zeros(1, 1, 16)
    with pytest.raises(ValueError, match="step_heads: there is no column 4 in a cache of 4"):
        module.step_heads(x, angles, angles, cache, cache, 4, None, None, 0.0, 0, 8)
    with pytest.raises(ValueError, match="step_heads: rows of x hold queries of 16 values"):
        module.step_heads(x[:, :40], angles, angles, cache, cache, 0, None, None, 0.0, 0, 8)
    with pytest.raises(ValueError, match="step_attend: columns 2 to 9 are not in a cache of 4"):
        module.step_attend(torch.zeros(2, 2, 1, 16), cache, cache, 2, 9, 1.0, None)
    rule = (None, 0.0, 0, 8)
    with pytest.raises(ValueError, match="step_heads: there is no column 8 in a cache of 4"):
        heads = (angles, angles, cache, cache, 0, 9, None, None, 0.0, 0, 8, 1.0, None)
        module.step_attention(x, [packed(64, 64, "q8_0")], ["q8_0"], [None], *rule, *heads, weight, "q8_0", None, *rule)
    with pytest.raises(ValueError, match="step_linear_add: the residual must be"):
        module.step_mlp(
            x, [weight, weight], ["q8_0"] * 2, [None] * 2, *rule, packed(32, 32, "q8_0"), "q8_0", None, *rule
        )


def test_faults_of_memory_are_refused() -> None:
    x, weight = torch.randn(1, 64), packed(32, 64, "q8_0")
    with pytest.raises(ValueError, match="the last dimension of x must be 64"):
        native.step_linears(x[:, :32], [weight], ["q8_0"], [None], None, 0.0, 0, 8, False)
    with pytest.raises(ValueError, match="must have the same in_features, got 64 and 32"):
        native.step_linears(x, [weight, packed(32, 32, "q8_0")], ["q8_0"] * 2, [None] * 2, None, 0.0, 0, 8, False)
    angles, cache = torch.zeros(1, 1, 16), torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match="at most 16 values"):
        native.step_heads(x, torch.zeros(1, 1, 18), torch.zeros(1, 1, 18), cache, cache, 0, None, None, 0.0, 0, 8)
    with pytest.raises(ValueError, match="a sequence for each of the 1 rows of x"):
        native.step_heads(x, angles, angles, cache.expand(2, 1, 4, 16), cache, 0, None, None, 0.0, 0, 8)
    with pytest.raises(ValueError, match="the columns of keys must be contiguous"):
        native.step_heads(x, angles, angles, cache.transpose(2, 3), cache, 0, None, None, 0.0, 0, 8)
    with pytest.raises(ValueError, match="do not fit"):
        native.step_attend(torch.zeros(1, 3, 1, 8), cache, cache, 0, 4, 1.0, None)
    with pytest.raises(ValueError, match=r"the mask must be bool \[1, 1, 1, 4\]"):
        native.step_attend(torch.zeros(1, 1, 1, 16), cache, cache, 0, 4, 1.0, torch.zeros(1, 1, 1, 3).bool())


def test_schemas_and_fakes() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, norm, weight = torch.randn(2, 1, 64), torch.randn(64), packed(64, 64, "q8_0")
    cache, angles = torch.zeros(2, 1, 4, 16), torch.zeros(2, 1, 16)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("step_norm", (x, norm, 1e-5, 0, 8)),
        ("step_gate", (x,)),
        ("step_linears", (x, [weight, weight], ["q8_0"] * 2, [None, norm], norm, 1e-5, 0, 8, True)),
        ("step_linear_add", (x, weight, "q8_0", None, x, norm, 1e-5, 0, 8)),
        ("step_heads", (x, angles, angles, cache, cache.clone(), 1, None, None, 1e-5, 0, 8)),
        ("step_attend", (torch.randn(2, 2, 1, 16), cache, cache, 0, 3, 1.0, None)),
    ]
    rule, no_norm = (norm, 1e-5, 0, 8), (None, 0.0, 0, 8)
    qkv, heads = [packed(n, 64, "q8_0") for n in (32, 16, 16)], (cache.clone(), cache.clone(), 0, 3)
    last = (packed(64, 32, "q8_0"), "q8_0", None, *no_norm)
    attention = (*heads, None, None, 1e-5, 0, 8, 1.0, None)
    cases += [
        ("step_attention", (x, qkv, ["q8_0"] * 3, [None] * 3, *rule, angles, angles, *attention, *last)),
        ("step_mlp", (x, [weight, weight], ["q8_0"] * 2, [None] * 2, *rule, weight, "q8_0", None, *no_norm)),
    ]
    for name, arguments in cases:
        opcheck(getattr(native, name).default, arguments, test_utils=checks)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_operators_keep_no_memory() -> None:
    """torch's own conversion of string arguments leaks a string per call, which a server would feel."""
    x, weight = torch.randn(1, 64), packed(8, 64, "q8_0")
    halves, down, rule = [packed(32, 64, "q8_0")] * 2, packed(64, 32, "q8_0"), (None, 0.0, 0, 8)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def calls(number: int) -> None:
        for _ in range(number):
            native.linear_frozen(x, weight, "q8_0", None)
            native.step_linears(x, [weight], ["q8_0"], [None], None, 0.0, 0, 8, False)
            native.step_mlp(x, halves, ["q8_0"] * 2, [None] * 2, *rule, down, "q8_0", None, *rule)

    calls(1000)
    before = resident()
    calls(40_000)
    assert resident() - before < 1_000_000  # two strings of 48 bytes per call would be 4 MB and more
