"""The operators as torch's tools see them: schemas, fakes, tracing, gradients, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FORMATS, every_dtype, weight
from torch.library import opcheck

from isqtorch import ops
from isqtorch.formats import QuantFormat

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def check_ops(fmt: QuantFormat, **options: Any) -> None:
    """torch's own checks of registered operators, on all."""
    w = weight(fmt, rows=6, blocks=2)
    packed = ops.quantize(w, fmt.name)
    x = torch.randn(3, w.shape[1], requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    opcheck(torch.ops.isqtorch.quantize.default, (w, fmt.name), **options)
    opcheck(torch.ops.isqtorch.quantize.default, (w.half(), fmt.name, torch.rand(w.shape[1]), None), **options)
    importance = torch.rand(w.shape[1])
    arguments = (w, fmt.name, torch.eye(w.shape[1]), importance)
    opcheck(torch.ops.isqtorch.quantize_feedback.default, arguments, **options)
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


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "Meta"])
def test_every_device_has_every_operator(key: str) -> None:
    """`linear_frozen` comes with `linear`: QuantLinear calls either."""
    for name in ("quantize", "dequantize", "linear", "linear_frozen", "embedding"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"isqtorch::{name}", key), name
