"""Formats: their facts, their names, and that bytes, fields and weights belong together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import ALL_FORMATS, same_bits
from torch import Tensor

from isqtorch.formats import QuantFormat, formats, get_format, resolve_format
from isqtorch.formats.bitstream import pack_planes, pack_stream, unpack_planes, unpack_stream

# name: (weights in a block, bytes of a block, where rows go that the block does not divide, what embeddings get)
FACTS = {
    "q4_0": (32, 18, None, "q6k"),
    "q4_1": (32, 20, None, "q6k"),
    "q5_0": (32, 22, None, "q8_0"),
    "q5_1": (32, 24, None, "q8_0"),
    "q8_0": (32, 34, None, None),
    "q8_1": (32, 36, None, "q8_0"),
    "q2k": (256, 84, "q4_0", "q6k"),
    "q3k": (256, 110, "q4_0", "q6k"),
    "q4k": (256, 144, "q5_0", "q6k"),
    "q5k": (256, 176, "q5_1", "q8_0"),
    "q6k": (256, 210, "q8_0", "q8_0"),
    "q8k": (256, 292, "q8_1", "q8_0"),
    "iq4_nl": (32, 18, None, "q6k"),
    "iq4_xs": (256, 136, "iq4_nl", "q6k"),
    "mxfp4": (32, 17, None, "q6k"),
    "afq2": (64, 20, "afq2g32", "afq6"),
    "afq3": (64, 28, "afq3g32", "afq6"),
    "afq4": (64, 36, "afq4g32", "afq6"),
    "afq5": (64, 44, "afq5g32", "afq8"),
    "afq6": (64, 52, "afq6g32", "afq8"),
    "afq8": (64, 68, "afq8g32", None),
    "hqq4": (64, 36, "hqq4g32", "hqq8"),
    "hqq8": (64, 68, "hqq8g32", None),
    "fp8": (128, 132, "q8_0", None),
    "afq4g32": (32, 20, None, "afq6g32"),
    "afq4g128.f16": (128, 68, "afq4g32.f16", "afq6g128.f16"),
    "afq3.f16": (64, 28, "afq3g32.f16", "afq6.f16"),
    "hqq4g128": (128, 68, "hqq4g32", "hqq8g128"),
    "hqq8g32": (32, 36, None, None),
}


def random_blocks(fmt: QuantFormat, n: int, seed: int = 0) -> Tensor:
    """Blocks of random codes and integer scales, whose float scales are ordinary numbers."""
    generator = torch.Generator().manual_seed(seed)
    raw = fmt.split(torch.randint(0, 256, (n, fmt.block_bytes), dtype=torch.uint8, generator=generator))
    for name, values in raw.items():
        if values.is_floating_point():
            raw[name] = torch.randn(values.shape, generator=generator).to(values.dtype)
    return fmt.join(raw)


# ---- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTS)
def test_facts(name: str) -> None:
    fmt = get_format(name)
    assert (fmt.block, fmt.block_bytes, fmt.fallback, fmt.promoted) == FACTS[name]
    assert fmt.bits_per_weight == 8 * fmt.block_bytes / fmt.block


def test_formats_lists_every_family_once() -> None:
    assert set(formats()) == {name for name in FACTS if "." not in name and "g" not in name}
    assert set(formats()) < set(formats(variants=True))
    assert len(formats(variants=True)) == 12 + 3 + 6 * 3 * 2 + 2 * 3 + 1


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)
def test_neighbours_exist(fmt: QuantFormat) -> None:
    if fmt.fallback:
        fallback = get_format(fmt.fallback)
        assert fallback.block == 32
        assert fallback.bits_per_weight >= fmt.bits_per_weight or fmt.name == "q8k"  # up, never down
    if fmt.promoted:
        promoted = get_format(fmt.promoted)
        assert promoted.bits >= fmt.bits or fmt.name in ("q8_1", "q8k")
    assert 0 < fmt.weight_error < 0.5
    assert fmt.formula and fmt.source


def test_importance() -> None:
    takers = {name for name in formats(variants=True) if get_format(name).takes_importance}
    assert takers == {"q4_0", "q4_1", "q5_0", "q5_1", "q2k", "q3k", "q4k", "q5k", "q6k", "iq4_nl", "iq4_xs"}


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Q4_0", "q4_0"),
        ("Q4K", "q4k"),
        ("q4_k", "q4k"),
        ("Q4_K", "q4k"),
        ("q6_K", "q6k"),
        ("AFQ4", "afq4"),
        ("afq4g64", "afq4"),
        ("afq4.bf16", "afq4"),
        ("afq4g64.bf16", "afq4"),
        ("afq4g64.f16", "afq4.f16"),
        ("afq8g32.bf16", "afq8g32"),
        ("HQQ4", "hqq4"),
        ("hqq8g64", "hqq8"),
        ("FP8", "fp8"),
        ("fp8_e4m3", "fp8"),
        ("4", "q4k"),
        (8, "q8_0"),
        (5, "q5k"),
    ],
)
def test_spellings(spelling: str | int, name: str) -> None:
    assert resolve_format(spelling).name == name


def test_bits_resolve_by_device() -> None:
    names = {bits: resolve_format(bits, "mps").name for bits in (2, 3, 4, 5, 6, 8)}
    assert names == {2: "afq2", 3: "afq3", 4: "afq4", 5: "q5k", 6: "afq6", 8: "afq8"}


@pytest.mark.parametrize("spec", ["q4_k_m", "", 7, True, 4.0, None])
def test_unknown_formats(spec: object) -> None:
    with pytest.raises(ValueError, match="format"):
        resolve_format(spec)  # type: ignore[arg-type]


def test_affine_scales_follow_the_weight() -> None:
    assert get_format("afq4").for_dtype(torch.float16).name == "afq4.f16"
    assert get_format("afq4g32").for_dtype(torch.float16).name == "afq4g32.f16"
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert get_format("afq4").for_dtype(dtype).name == "afq4"
    assert get_format("afq4.f16").for_dtype(torch.bfloat16).name == "afq4.f16"  # asked for by name
    assert get_format("q4k").for_dtype(torch.float16).name == "q4k"


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)
def test_row_sizes(fmt: QuantFormat) -> None:
    assert fmt.in_features(fmt.row_bytes(3 * fmt.block)) == 3 * fmt.block
    for wrong in (0, -fmt.block, fmt.block // 2, fmt.block + 1):
        with pytest.raises(ValueError, match=f"{fmt.name}: in_features must be a positive multiple of {fmt.block}"):
            fmt.row_bytes(wrong)
    for wrong in (0, fmt.block_bytes + 1):
        with pytest.raises(ValueError, match=f"{fmt.name}: a packed row must be"):
            fmt.in_features(wrong)


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_pack_inverts_unpack(fmt: QuantFormat, n: int) -> None:
    blocks = torch.randint(0, 256, (n, fmt.block_bytes), dtype=torch.uint8)  # every pattern is valid
    fields = fmt.unpack(blocks)
    assert fields["q"].shape == (n, fmt.block)
    assert torch.equal(fmt.pack(fields), blocks)
    assert fmt.decode(fields).shape == (n, fmt.block)
    assert fmt.decode(fields).dtype == torch.float32


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_stream(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 64), dtype=torch.uint8)
    packed = pack_stream(codes, bits)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (k * bits) for k, code in enumerate(row))
        assert bytes(stream) == number.to_bytes(64 * bits // 8, "little")
    assert torch.equal(unpack_stream(packed, bits), codes)


@pytest.mark.parametrize(("bits", "width"), [(1, 32), (2, 32), (4, 16), (4, 32), (4, 64), (2, 4), (4, 8)])
def test_planes(bits: int, width: int) -> None:
    count = 2 * width * 8 // bits
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8)
    packed = pack_planes(codes, bits, width)
    for k in range(count):
        chunk, plane, byte = k // (count // 2), k % (count // 2) // width, k % width
        assert torch.equal(packed[:, chunk * width + byte] >> plane * bits & (1 << bits) - 1, codes[:, k])
    assert torch.equal(unpack_planes(packed, bits, width), codes)


# ---- meaning: the formulas once more, one weight at a time -----------------------------------------------------------

f32 = np.float32


def half(block: bytes, at: int) -> np.float32:
    return f32(np.frombuffer(block, "<f2", 1, at)[0])


def bfloat(block: bytes, at: int) -> np.float32:
    return np.frombuffer(bytes(2) + block[at : at + 2], "<f4", 1)[0]


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def stream(block: bytes, at: int, bits: int, k: int) -> int:
    return int.from_bytes(block[at:], "little") >> (k * bits) & ((1 << bits) - 1)


def spec_q4_0(b: bytes, e: int) -> np.float32:
    return f32((b[2 + e % 16] >> 4 * (e // 16) & 15) - 8) * half(b, 0)


def spec_q5_1(b: bytes, e: int) -> np.float32:
    q = (b[8 + e % 16] >> 4 * (e // 16) & 15) | (b[4 + e // 8] >> e % 8 & 1) << 4
    return f32(q) * half(b, 0) + half(b, 2)


def spec_q8_0(b: bytes, e: int) -> np.float32:
    return f32(signed(b[2 + e])) * half(b, 0)


def spec_q2k(b: bytes, e: int) -> np.float32:
    scales, q = b[e // 16], b[16 + 32 * (e // 128) + e % 32] >> 2 * (e % 128 // 32) & 3
    return half(b, 80) * f32(scales & 15) * f32(q) - half(b, 82) * f32(scales >> 4)


def spec_q3k(b: bytes, e: int) -> np.float32:
    j = e // 16
    low = b[96 + j % 8] >> (4 if j >= 8 else 0) & 15
    scale = (low | (b[104 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32
    q = b[32 + 32 * (e // 128) + e % 32] >> 2 * (e % 128 // 32) & 3
    return half(b, 108) * f32(scale) * f32(q - (0 if b[e % 32] >> e // 32 & 1 else 4))


def scales_q45k(b: bytes, j: int) -> tuple[int, int]:
    s = b[4:16]
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4


def spec_q4k(b: bytes, e: int) -> np.float32:
    sc, mn = scales_q45k(b, e // 32)
    q = b[16 + 32 * (e // 64) + e % 32] >> 4 * (e % 64 // 32) & 15
    return half(b, 0) * f32(sc) * f32(q) - half(b, 2) * f32(mn)


def spec_q5k(b: bytes, e: int) -> np.float32:
    sc, mn = scales_q45k(b, e // 32)
    q = (b[48 + 32 * (e // 64) + e % 32] >> 4 * (e % 64 // 32) & 15) | (b[16 + e % 32] >> e // 32 & 1) << 4
    return half(b, 0) * f32(sc) * f32(q) - half(b, 2) * f32(mn)


def spec_q6k(b: bytes, e: int) -> np.float32:
    low = b[64 * (e // 128) + e % 64] >> 4 * (e % 128 // 64) & 15
    high = b[128 + 32 * (e // 128) + e % 32] >> 2 * (e % 128 // 32) & 3
    return half(b, 208) * f32(signed(b[192 + e // 16])) * f32((low | high << 4) - 32)


def spec_q8k(b: bytes, e: int) -> np.float32:
    return np.frombuffer(b, "<f4", 1)[0] * f32(signed(b[4 + e]))


def spec_afq3(b: bytes, e: int) -> np.float32:
    return bfloat(b, 0) * f32(stream(b, 4, 3, e)) + bfloat(b, 2)


def spec_afq6_f16(b: bytes, e: int) -> np.float32:
    return half(b, 0) * f32(stream(b, 4, 6, e)) + half(b, 2)


def spec_hqq4(b: bytes, e: int) -> np.float32:
    return (f32(stream(b, 4, 4, e)) - half(b, 2)) * half(b, 0)


def spec_fp8(b: bytes, e: int) -> np.float32:
    code = b[4 + e]
    exponent, mantissa = code >> 3 & 15, code & 7
    value = mantissa / 512 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return f32(-value if code & 128 else value) * np.frombuffer(b, "<f4", 1)[0]


SPECS: dict[str, Callable[[bytes, int], np.float32]] = {
    "q4_0": spec_q4_0,
    "q5_1": spec_q5_1,
    "q8_0": spec_q8_0,
    "q2k": spec_q2k,
    "q3k": spec_q3k,
    "q4k": spec_q4k,
    "q5k": spec_q5k,
    "q6k": spec_q6k,
    "q8k": spec_q8k,
    "afq3": spec_afq3,
    "afq6.f16": spec_afq6_f16,
    "hqq4": spec_hqq4,
    "fp8": spec_fp8,
}


@pytest.mark.parametrize("name", SPECS)
def test_decode_follows_the_specification(name: str) -> None:
    fmt = get_format(name)
    blocks = random_blocks(fmt, 5)
    if name == "fp8":
        blocks[:, 4:] &= 0xFE  # no NaN
    want = [[SPECS[name](bytes(block), e) for e in range(fmt.block)] for block in blocks.tolist()]
    assert same_bits(fmt.decode(fmt.unpack(blocks)), torch.from_numpy(np.array(want, np.float32)))
