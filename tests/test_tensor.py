"""QuantizedTensor: one weight, and the ways to and from MLX and HQQ."""

from __future__ import annotations

import pytest
import torch
from helpers import FORMATS, relative_error, weight

from isqtorch.formats import QuantFormat, get_format
from isqtorch.ops.reference import quantize
from isqtorch.tensor import QuantizedTensor
from isqtorch.tensor import quantize as quantize_tensor

W = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_quantized_tensor(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=6).view(2, 3, -1).bfloat16()
    packed = quantize_tensor(w, fmt.name)
    assert packed.format is fmt and packed.shape == w.shape and packed.dtype == w.dtype
    assert packed.dequantize().dtype == torch.bfloat16
    assert relative_error(packed.dequantize(torch.float32), w) < 1.6 * fmt.weight_error
    assert packed.nbytes == w.numel() * packed.bits_per_weight / 8
    assert f"2 x 3 x {w.shape[-1]}, {fmt.name}, " in repr(packed)


def test_quantize_chooses_the_format() -> None:
    assert quantize_tensor(W, 4).format.name == "q4k"
    assert quantize_tensor(W.half(), "afq4").format.name == "afq4.f16"
    assert quantize_tensor(torch.nn.Parameter(W), "afq4.f16").format.name == "afq4.f16"
    with pytest.raises(TypeError, match=r"weight must be a torch.Tensor, got list"):
        quantize_tensor([[1.0]], 4)  # type: ignore[arg-type]


def test_quantized_tensor_rejects_what_does_not_fit() -> None:
    data = quantize(W, "q4k")
    with pytest.raises(ValueError, match=r"hold a weight of shape \[4, 256\], not \[4, 512\]"):
        QuantizedTensor(data, get_format("q4k"), torch.Size([4, 512]), torch.float32)
    with pytest.raises(ValueError, match=r"data must be uint8"):
        QuantizedTensor(W, get_format("q4k"), W.shape, W.dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mlx_round_trip(bits: int, group: int, dtype: torch.dtype) -> None:
    packed = quantize_tensor(torch.randn(2, 3, 256).to(dtype), f"afq{bits}g{group}")
    mlx = packed.to_mlx()
    assert [tuple(part.shape) for part in mlx] == [(2, 3, 8 * bits), (2, 3, 256 // group), (2, 3, 256 // group)]
    back = QuantizedTensor.from_mlx(*mlx, bits=bits)
    assert back.format is packed.format and back.shape == packed.shape and torch.equal(back.data, packed.data)


@pytest.mark.parametrize("name", ["hqq4", "hqq8", "hqq4g32", "hqq8g128"])
def test_hqq_round_trip(name: str) -> None:
    packed = quantize_tensor(W, name)
    back = QuantizedTensor.from_hqq(*packed.to_hqq(), shape=W.shape, dtype=W.dtype)
    assert back.format is packed.format and back.dtype == W.dtype and torch.equal(back.data, packed.data)


def test_wrong_conversions() -> None:
    afq, hqq = quantize_tensor(W, "afq4"), quantize_tensor(W, "hqq4")
    with pytest.raises(ValueError, match=r"to_mlx: hqq4 is of another family"):
        hqq.to_mlx()
    with pytest.raises(ValueError, match=r"to_hqq: afq4 is of another family"):
        afq.to_hqq()
    with pytest.raises(ValueError, match=r"4-bit groups in pairs, and \[1, 192\] has 3"):
        quantize_tensor(W[:1, :192], "hqq4").to_hqq()
    codes, scales, biases = afq.to_mlx()
    with pytest.raises(ValueError, match=r"Is `bits` right"):
        QuantizedTensor.from_mlx(codes, scales, biases, bits=3)
    with pytest.raises(ValueError, match=r"from_mlx: weight must be uint32"):
        QuantizedTensor.from_mlx(codes.view(torch.uint8), scales, biases, bits=4)
    with pytest.raises(ValueError, match=r"both float16 or both bfloat16"):
        QuantizedTensor.from_mlx(codes, scales.float(), biases.float(), bits=4)
    with pytest.raises(ValueError, match=r"do not fit a weight"):
        QuantizedTensor.from_mlx(codes[:3], scales, biases, bits=4)
    W_q, scale, zero = hqq.to_hqq()
    with pytest.raises(ValueError, match=r"from_hqq: W_q \[8, 64\].*of shape \[4, 128\]"):
        QuantizedTensor.from_hqq(W_q, scale, zero, shape=(4, 128))
    with pytest.raises(ValueError, match=r"not finite in float16"):
        QuantizedTensor.from_hqq(W_q, scale.float() * 1e9, zero, shape=W.shape)
