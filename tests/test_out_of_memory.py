"""Memory that runs out while a model is packed: the error names the layer, what was done and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import isqtorch
from isqtorch.inplace import dequantize, pack

ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory.\nMore text"), MemoryError(), RuntimeError(ON_CPU)]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def failing_at(call: int, error: Exception) -> Callable[..., Tensor]:
    """`pack_weight` that runs out of memory at this call."""
    calls, real = iter(range(100)), pack.pack_weight

    def pack_weight(weight: Tensor, job: pack.Job) -> Tensor:
        if next(calls) == call:
            raise error
        return real(weight, job)

    return pack_weight


@each_error
def test_quantize(error: Exception) -> None:
    m = model()
    with mock.patch("isqtorch.inplace.quantize.pack_weight", failing_at(1, error)):
        with pytest.raises(type(error), match=r"quantize_: 2.*q8_0.*1 of 2 weights are packed.*load") as caught:
            isqtorch.quantize_(m, "q8_0")
    assert type(caught.value) is type(error) and "\n" not in str(caught.value)
    assert isinstance(m[0], isqtorch.QuantLinear) and type(m[2]) is nn.Linear
    assert m(torch.ones(1, 64)).isfinite().all()


@each_error
def test_requantize(error: Exception) -> None:
    m = model()
    isqtorch.quantize_(m, "q8_0")
    before = [m[0], m[2]]
    with mock.patch("isqtorch.inplace.requantize.pack_weight", failing_at(1, error)):
        with pytest.raises(type(error), match=r"requantize_: 2.*Nothing was changed"):
            isqtorch.requantize_(m, "q4_0", source="stored")
    assert [m[0], m[2]] == before


@each_error
def test_dequantize(error: Exception) -> None:
    m = model()
    isqtorch.quantize_(m, "q8_0")
    calls, real = iter(range(100)), dequantize.float_weight

    def float_weight(*args: Any) -> nn.Parameter:
        if next(calls) == 1:
            raise error
        return real(*args)

    with mock.patch("isqtorch.inplace.dequantize.float_weight", float_weight):
        with pytest.raises(
            type(error), match=r"^dequantize_: 2: .* it was decoded\. 1 of 2 .* call dequantize_"
        ) as caught:
            isqtorch.dequantize_(m)
    assert type(caught.value) is type(error) and "\n" not in str(caught.value)
    assert type(m[0]) is nn.Linear and isinstance(m[2], isqtorch.QuantLinear)
    assert m(torch.ones(1, 64)).isfinite().all()
    isqtorch.dequantize_(m)  # as the message says
    assert type(m[0]) is type(m[2]) is nn.Linear


NO_MACHINE = torch.ones(1, 1).expand(1 << 40, 256)
"""A weight of 1 PB."""


def test_memory_that_no_machine_has() -> None:
    """The native operators' own error, not one made by the tests."""
    job = pack.Job(("wide",), True, isqtorch.get_format("q8_0"), None, None, None, mock.Mock())
    with pytest.raises(
        MemoryError, match=r"quantize_: wide: memory ran out.*q8_0\. State\. \(isqtorch: no memory for a"
    ):
        with pack.naming_memory("quantize_", "wide", "packed in q8_0", "State."):
            pack.pack_weight(NO_MACHINE, job)


def test_operators_name_the_shape_that_has_no_memory() -> None:
    packed = torch.zeros(1, 144, dtype=torch.uint8)
    with pytest.raises(MemoryError, match=r"no memory for a tensor of shape \[1099511627776, 256\]"):
        torch.ops.isqtorch.quantize(NO_MACHINE, "q4k")
    with pytest.raises(MemoryError, match=r"no memory for a tensor of shape \[1099511627776, 144\]"):
        torch.ops.isqtorch.dequantize(packed.expand(1 << 40, 144), "q4k", torch.float32)
    with pytest.raises(MemoryError, match=r"no memory for a tensor of shape \[1099511627776, 4\]"):
        torch.ops.isqtorch.square_sums(torch.ones(3, 4), None, 1 << 40)


def test_other_errors_stay_as_they_are() -> None:
    m = model()
    with mock.patch("isqtorch.inplace.quantize.pack_weight", failing_at(0, RuntimeError("CUDA error: misaligned"))):
        with pytest.raises(RuntimeError, match="^CUDA error: misaligned$"):
            isqtorch.quantize_(m, "q8_0")
