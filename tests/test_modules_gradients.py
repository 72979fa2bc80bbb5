"""QuantLinear has an operator with a gradient and one without: which it calls, what that costs, and that every derivative is right."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import linear
from torch.autograd import forward_ad

every_mode = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])


@pytest.mark.parametrize("bias_trains", [False, True])
def test_gradients(bias_trains: bool) -> None:
    layer = linear()
    layer.bias.requires_grad_(bias_trains)
    x = torch.randn(4, 512, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(4, -1))
    assert layer.weight.grad is None
    assert (layer.bias.grad is not None) == bias_trains
    if bias_trains:
        assert torch.equal(layer.bias.grad, torch.full((24,), 4.0))


def fastest(*calls: Callable[[], object]) -> list[float]:
    """CPU seconds of each call, the best of many short rounds that take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(40):
        for i, call in enumerate(calls):
            best[i] = min(best[i], timeit.timeit(call, number=100, timer=time.thread_time))
    return best


@every_mode
def test_call_costs_little_more_than_the_operator(mode: Any) -> None:
    """Where nothing wants a gradient: 1.4 of the operator here, and 2.5 with the gradient's Python in between."""
    layer = linear("q8_0").requires_grad_(False)
    x, packed, bias = torch.randn(1, 512), layer.weight, layer.bias
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mode():
            operator = torch.ops.isqtorch.linear_frozen.default
            module, bare = fastest(lambda: layer(x), lambda: operator(x, packed, "q8_0", bias))
    finally:
        torch.set_num_threads(threads)
    assert module < 1.8 * bare


@every_mode
@pytest.mark.parametrize("bias_trains", [True, False])
def test_both_operators_give_the_same(mode: Any, bias_trains: bool) -> None:
    layer = linear("q4k")
    layer.bias.requires_grad_(bias_trains)
    x = torch.randn(3, 512)
    want = torch.ops.isqtorch.linear(x, layer.weight, layer.format, layer.bias).detach()
    with mode():
        y = layer(x)
    assert torch.equal(y.detach(), want)
    assert y.requires_grad == (bias_trains and mode is torch.enable_grad)
    torch.testing.assert_close(torch.func.vmap(layer)(x), want, rtol=0, atol=0.02 * float(want.abs().max()))


def test_every_kind_of_derivative() -> None:
    """torch.func and forward mode, which know nothing of the operator's gradient: a forward-mode one of zero is wrong."""
    layer = linear("q8_0")
    w = torch.ops.isqtorch.dequantize(layer.weight, "q8_0", torch.float32)
    x, direction = torch.randn(2, 3, 512)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, direction @ w.t())
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (direction,))[1], direction @ w.t())
    for jacobian in (torch.func.jacrev(layer), torch.func.jacfwd(layer)):
        torch.testing.assert_close(jacobian(x[0]), w)
    half, few = layer.bfloat16(), x.bfloat16()
    half.bias.data = half.bias.data.float()  # a bias of another type than x
    got, tangent = torch.func.jvp(half, (few,), (direction.bfloat16(),))
    assert got.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.float(), direction @ w.t(), rtol=0.05, atol=0.5)
    layer = linear("q8_0", bias=False)
    w = torch.ops.isqtorch.dequantize(layer.weight, "q8_0", torch.float32)
    square = torch.func.hessian(lambda row: layer(row).square().sum())(x[0])
    torch.testing.assert_close(square, 2 * w.t() @ w, rtol=1e-4, atol=1e-3)


def test_tracers_see_the_operator_with_a_gradient() -> None:
    layer = linear("q8_0").requires_grad_(False)
    exported = torch.export.export(layer, (torch.randn(1, 512),))
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.isqtorch.linear.default]


def test_weight_outside_of_the_parameters() -> None:
    """FSDP1 takes the parameters out and sets views of its own flat one as attributes."""
    layer = linear("q8_0").requires_grad_(False)
    x = torch.randn(2, 512)
    want, weight, bias = layer(x), layer.weight.data, layer.bias.data
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    assert "weight" not in layer._parameters and torch.equal(layer(x), want)
