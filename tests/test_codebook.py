"""Formats with a table of levels: mxfp4's exponents, its other order of bytes, and ties between levels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import golden, same_bits

import isqtorch
from isqtorch import ops
from isqtorch.formats import get_format
from isqtorch.formats.codebook import E2M1_LEVELS, IQ4_LEVELS, mxfp4_blocks, mxfp4_codes, power_of_two

MLX = golden("affine")


# ---- mxfp4 as checkpoints have it --------------------------------------------------------------------------------------


def test_mxfp4_of_mlx() -> None:
    """MLX's own bytes, converted, decode to MLX's own numbers."""
    codes = MLX["mlxfp/mxfp4/wq"].view(torch.uint8)
    scales, want = MLX["mlxfp/mxfp4/scales"], MLX["mlxfp/mxfp4/deq"]
    packed = mxfp4_blocks(codes, scales)
    assert packed.shape == (19, get_format("mxfp4").row_bytes(256))
    assert torch.equal(torch.ops.isqtorch.dequantize(packed, "mxfp4", torch.float32), want)
    for got, stored in zip(mxfp4_codes(packed), (codes, scales), strict=True):
        assert torch.equal(got, stored)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("grouped", [False, True])
def test_mxfp4_there_and_back(lead: tuple[int, ...], grouped: bool) -> None:
    """Every byte survives, for matrices and stacks, with the codes in one dimension or (gpt-oss) in two."""
    codes = torch.randint(0, 256, (*lead, 90, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, (*lead, 90), dtype=torch.uint8)
    packed = mxfp4_blocks(codes if grouped else codes.flatten(-2), scales)
    assert packed.shape == (*lead, 90 * 17) and packed.is_contiguous()
    back, again = mxfp4_codes(packed)
    assert torch.equal(back, codes.flatten(-2)) and torch.equal(again, scales)


def test_mxfp4_order_of_the_codes() -> None:
    """Byte j of a checkpoint has weights 2j and 2j + 1; weight i of the first 16 is the low nibble of byte i of a block."""
    codes = torch.zeros(16, dtype=torch.uint8)
    codes[0], codes[8] = 0x21, 0x43  # weights 0, 1, 16, 17
    block = mxfp4_blocks(codes, torch.tensor([127], dtype=torch.uint8))
    assert block.tolist() == [127, 0x31, 0x42, *[0] * 14]


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.uint8)),
        (torch.zeros(4, 32), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros(4, 2, 8, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros(5, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros((), dtype=torch.uint8), torch.zeros((), dtype=torch.uint8)),
    ],
)
def test_mxfp4_parts_that_do_not_fit(codes: torch.Tensor, scales: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"mxfp4_blocks: expected uint8 codes .* got"):
        mxfp4_blocks(codes, scales)


@pytest.mark.parametrize("blocks", [torch.zeros(2, 18, dtype=torch.uint8), torch.zeros(2, 17), torch.tensor(0)])
def test_mxfp4_blocks_that_are_none(blocks: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"mxfp4_codes: .*multiple of 17 bytes"):
        mxfp4_codes(blocks)


# ---- scales ------------------------------------------------------------------------------------------------------------


def test_powers_of_two() -> None:
    e = torch.arange(255, dtype=torch.uint8)
    want = torch.tensor([2.0 ** (i - 128) for i in range(255)], dtype=torch.float64).float()
    assert same_bits(power_of_two(e), want)
    assert float(power_of_two(torch.tensor(255, dtype=torch.uint8))) == 2.0**127  # as in ggml


def test_every_exponent_decodes(impl: Any, float_mode: Any) -> None:
    """0 and 1 stand for subnormal scales, and so may be the weights."""
    fmt = get_format("mxfp4")
    e, q = torch.arange(255, dtype=torch.uint8), torch.arange(32, dtype=torch.uint8).expand(255, 32) & 15
    packed = fmt.pack({"e": e, "q": q})
    levels = torch.tensor(E2M1_LEVELS * 2, dtype=torch.float64)
    want = (torch.tensor([2.0 ** (i - 128) for i in range(255)], dtype=torch.float64)[:, None] * levels).float()
    want[:, 8::16] = 0  # the second code of zero has no sign, as in ggml

    def check() -> None:
        assert same_bits(impl.dequantize(packed, "mxfp4", torch.float32), want)

    float_mode(check)


def test_mxfp4_scale_that_is_nan() -> None:
    fmt = get_format("mxfp4")
    packed = torch.ops.isqtorch.quantize(torch.randn(64, 32), "mxfp4", None)
    assert fmt.fault(packed) is None
    packed[3, 0] = 255
    assert fmt.fault(packed) == "1 of 64 sampled values of 'e' are NaN or infinite"


def test_mxfp4_blocks_of_zeros_are_plausible() -> None:
    w = torch.randn(64, 32)
    w[10:] = 0
    assert get_format("mxfp4").fault(torch.ops.isqtorch.quantize(w, "mxfp4", None)) is None


@pytest.mark.parametrize("size", [2.0**-149, 1e-42, 2.0**-126, 2.0**-125, 1e-37, 3e38])
def test_mxfp4_at_the_ends_of_f32(size: float, impl: Any, float_mode: Any) -> None:
    """No exponent leaves the byte, and the largest weight keeps its size as far as the smallest scale allows."""
    w = torch.zeros(1, 32, dtype=torch.float64)
    w[0, 3], w[0, 20] = size, -size / 2
    packed, stored = [], w.float()
    float_mode(lambda: packed.append(impl.quantize(stored, "mxfp4", None, None)))
    assert 0 <= int(packed[0][0, 0]) < 254
    decoded = ops.reference.dequantize(packed[0], "mxfp4", torch.float32)
    assert bool(((decoded.double() - w).abs() <= max(0.25 * size, 2.0**-129)).all())


# ---- levels ------------------------------------------------------------------------------------------------------------


def test_every_iq4_level_is_reached(impl: Any) -> None:
    """Weights that are levels times a power of two come back exactly."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32).repeat(2) * 2.0**-7
    for name in ("iq4_nl", "iq4_xs"):
        fmt = get_format(name)
        w = levels.repeat(1, fmt.block // 32)
        packed = impl.quantize(w, name, None, None)
        assert torch.allclose(impl.dequantize(packed, name, torch.float32), w, rtol=2**-10, atol=0)


def test_iq4_columns_without_importance_are_zero(impl: Any) -> None:
    """As in ggml: a block that nobody reads has scale 0."""
    w, importance = torch.randn(4, 64), torch.ones(64)
    importance[32:] = 0
    decoded = impl.dequantize(impl.quantize(w, "iq4_nl", importance, None), "iq4_nl", torch.float32)
    assert bool(decoded[:, :32].any()) and not bool(decoded[:, 32:].any())


def test_rows_that_256_does_not_divide_get_iq4_nl() -> None:
    report = isqtorch.quantize_(torch.nn.Sequential(torch.nn.Linear(96, 32)), "iq4_xs", progress=False)
    assert report.layers[0].stored == "iq4_nl"
