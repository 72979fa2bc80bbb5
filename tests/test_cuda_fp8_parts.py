"""The kernels between x, an FP8 weight and torch's FP8 product, in the emulator: x and weights as codes and scales, and the bias."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulator import kernels
from helpers import DTYPES, fp8_parts, uneven
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import get_format

HERE = Path(__file__).resolve()
FP8 = get_format("fp8")
RUN = 128
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


class Parts:
    """Memory for codes and scales, full of 0xff, that ends where they end."""

    def __init__(self, rows: int, k: int) -> None:
        memory = kernels.Memory()
        self.codes = memory.new((rows, k), torch.uint8, "codes")
        self.scales = memory.new((k // RUN, rows), torch.float32, "scales")
        self.struct = kernels.PARTS(self.codes.data_ptr(), self.scales.data_ptr(), rows, k)


def quantized(x: Tensor, rows: int) -> Parts:
    parts = Parts(rows, x.shape[1])
    kernels.run_fp8(
        "quantize_activations", kernels.Memory().put(x, "x") if len(x) else x, x.dtype, len(x), parts.struct
    )
    return parts


@every_dtype
@pytest.mark.parametrize(("m", "k"), [(1, 128), (7, 640), (9, 384), (33, 512)])
def test_activations_have_the_bytes_of_weights(m: int, k: int, dtype: torch.dtype) -> None:
    """And zeros in the rows behind them."""
    x, rows = uneven(m, k, dtype), (m + 15) // 16 * 16
    parts, (codes, scales) = quantized(x, rows), fp8_parts(ops.quantize(x, "fp8"))
    assert torch.equal(parts.codes[:m], codes) and torch.equal(parts.scales[:, :m], scales)
    assert not parts.codes[m:].any() and bool((parts.scales[:, m:] == 1).all())


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e15, 8e37])
def test_extreme_activations(scale: float) -> None:
    x = uneven(3, 256) * scale
    codes, scales = fp8_parts(ops.quantize(x, "fp8"))
    parts = quantized(x, 3)
    assert torch.equal(parts.codes, codes) and torch.equal(parts.scales, scales)


@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_run_with_a_number_that_is_none_has_nan_for_its_scale(value: float, dtype: torch.dtype) -> None:
    x = uneven(8, 512, dtype)
    x[6, 300] = value
    parts = quantized(x, 8)
    nan = parts.scales.isnan()
    assert bool(nan[2, 6]) and int(nan.sum()) == 1
    x[6, 300] = 0
    assert torch.equal(quantized(x, 8).scales[~nan], parts.scales[~nan])


@pytest.mark.parametrize(("rows", "k"), [(1, 128), (5, 640), (16, 384), (130, 256)])
def test_a_weight_is_split_exactly(rows: int, k: int) -> None:
    packed = torch.randint(0, 256, (rows, FP8.row_bytes(k)), dtype=torch.uint8)  # codes and scales of every kind
    parts, (codes, scales) = Parts(rows, k), fp8_parts(packed)
    kernels.run_fp8("split_fp8", kernels.Memory().put(packed, "weight", align=4), parts.struct)
    assert torch.equal(parts.codes, codes)
    assert torch.equal(parts.scales.view(torch.int32), scales.view(torch.int32))


@every_dtype
def test_a_bias_is_added_with_one_rounding(dtype: torch.dtype) -> None:
    y, bias = torch.randn(37, 48).to(dtype), torch.randn(48).to(dtype)
    memory = kernels.Memory()
    out = memory.put(y, "y")
    kernels.run_fp8("add_bias", out, memory.put(bias, "bias"), dtype, 37, 48)
    assert torch.equal(out, (y.float() + bias.float()).to(dtype))


def test_no_rows() -> None:
    quantized(torch.zeros(0, 256), 0)
    kernels.run_fp8("split_fp8", None, Parts(0, 256).struct)
    kernels.run_fp8("add_bias", None, None, torch.float32, 0, 64)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_order_does_not_matter(order: str) -> None:
    with kernels.schedule(order):
        test_activations_have_the_bytes_of_weights(9, 384, torch.bfloat16)
        test_a_weight_is_split_exactly(5, 640)
        test_a_bias_is_added_with_one_rounding(torch.float16)


SANITIZED = "have_the_bytes or split_exactly or one_rounding"


@pytest.mark.slow
@pytest.mark.skipif(kernels.VARIANT != "plain", reason="runs these tests under a sanitizer")
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_have_nothing_to_say(variant: str) -> None:
    kernels.sanitized_pytest(variant, str(HERE), "-k", SANITIZED)
