"""The types of tensors in GGUF files: the table, and decoding of those that are formats and of those that are not."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch
from helpers import golden, same_bits
from torch import Tensor

from isqtorch.formats import formats, get_format
from isqtorch.formats.gguf_decode import _GRIDS, DECODERS, _grid
from isqtorch.formats.gguf_types import GGUF_TYPES, GgufType, decode

GOLDEN = golden("gguf_types")
BY_NAME = {kind.name: kind for kind in GGUF_TYPES.values()}
ONE = {"TQ1_0": 52, "TQ2_0": 64}  # where d is, if not at the beginning

# sha256 of what libggml-base 0.25.3 decodes from `many_blocks`: all entries of all grids are in it.
DIGESTS = {
    "IQ1_S": "493191fdcd18c7d6c6c6c2c30e76946372cc4f65fefc3633ce0dee1e37d59784",
    "IQ1_M": "ad7da4e3150cacf424fab67a58747ed35e68a193de9b740cee032ad9fb78268e",
    "IQ2_XXS": "b304c413789d73f947e1e29151a68a49b9433dc805ba8fcc53134c2c2bfee98f",
    "IQ2_XS": "7a38f2cd11b97c89536e26e5907b37152630b28de0e4a4cb3d8cb94d6bac931d",
    "IQ2_S": "e6f03db260a6c5e040ce175b3759d11e46fdd523fb687ce54b90293fb728049c",
    "IQ3_XXS": "2734819fa3d691591136ec4104c1836edc2069f7343b07ad36318f215d1db3ce",
    "IQ3_S": "9bec7aedabbbcd01b841387c4957f0da685dae1745174c9a78b6cd7d71d70317",
    "TQ1_0": "2f10355ccd4a75baa7a371091feabb969b97e2f01967f10dbde9405bc91a8db8",
    "TQ2_0": "3512aa99d208953ac4b90d171152eb3eeee72405458393bb80e499300daf9b81",
    "NVFP4": "df0faa8c4b618b40666a79023a4e758df42a3080449ee8c74ba048a29a723034",
}


def many_blocks(kind: GgufType) -> Tensor:
    """4000 blocks of all kinds of codes whose d is 1: uint8 `[4000, block_bytes]`."""
    place = torch.arange(4000 * kind.block_bytes, dtype=torch.int64)
    blocks = ((place * 2654435761 % 4294967291) >> 11 & 255).to(torch.uint8).view(4000, kind.block_bytes)
    if kind.name == "IQ1_M":  # d is spread over the upper nibbles of four words
        for i, nibble in enumerate((0x00, 0x00, 0xC0, 0x30)):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | nibble
    elif kind.name != "NVFP4":
        at = ONE.get(kind.name, 0)
        blocks[:, at : at + 2] = torch.tensor([0x00, 0x3C], dtype=torch.uint8)
    return blocks


def test_table() -> None:
    assert len(GGUF_TYPES) == len(BY_NAME) == 33
    assert all(number == kind.number for number, kind in GGUF_TYPES.items())
    for kind in GGUF_TYPES.values():
        if kind.format is not None:
            fmt = get_format(kind.format)
            assert (fmt.block, fmt.block_bytes) == (kind.block, kind.block_bytes), kind
    plain = {kind.name for kind in GGUF_TYPES.values() if kind.block == 1}
    assert plain == {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
    packed = {kind.format for kind in GGUF_TYPES.values() if kind.format}
    assert packed == {name for name in formats() if not name.startswith(("afq", "hqq", "fp8"))}
    assert {kind.name for kind in GGUF_TYPES.values() if kind.block > 1 and not kind.format} == set(DECODERS)


@pytest.mark.parametrize("name", DECODERS)
def test_golden_bytes_of_types_without_format(name: str) -> None:
    kind = BY_NAME[name]
    data, want = GOLDEN[f"q/{name}"], GOLDEN[f"dq/{name}"]
    assert same_bits(decode(kind.number, data), want)
    rows = data.view(2, 3, -1)  # a stack of matrices, two blocks in a row
    assert same_bits(decode(kind.number, rows), want.view(2, 3, -1))


@pytest.mark.parametrize("name", DECODERS)
def test_all_codes_of_types_without_format(name: str) -> None:
    kind = BY_NAME[name]
    decoded = decode(kind.number, many_blocks(kind))
    assert hashlib.sha256(decoded.numpy().tobytes()).hexdigest() == DIGESTS[name]


@pytest.mark.parametrize("name", _GRIDS)
def test_grids_are_whole(name: str) -> None:
    grid = _grid(name)
    assert grid.shape == (_GRIDS[name].entries, _GRIDS[name].width)
    assert len(grid.unique(dim=0)) == len(grid) and set(grid.unique().tolist()) == set(_GRIDS[name].values)


@pytest.mark.parametrize("kind", [kind for kind in GGUF_TYPES.values() if kind.format], ids=lambda kind: kind.name)
def test_types_that_are_formats(kind: GgufType) -> None:
    w = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.isqtorch.quantize(w, kind.format, None)
    assert same_bits(decode(kind.number, packed), torch.ops.isqtorch.dequantize(packed, kind.format, torch.float32))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"])
def test_plain_numbers(dtype: str) -> None:
    torch_dtype = {"F": f"float{dtype[1:]}", "I": f"int{dtype[1:]}", "B": "bfloat16"}[dtype[0]]
    numbers = torch.tensor([[1, -2, 3], [0, 100, -7]]).to(getattr(torch, torch_dtype))
    decoded = decode(BY_NAME[dtype].number, numbers.view(torch.uint8))
    assert decoded.dtype == torch.float32 and torch.equal(decoded, numbers.float())


def test_long_tensors_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode(16, many_blocks(BY_NAME["IQ2_XXS"]))
    monkeypatch.setattr(sys.modules[decode.__module__], "_CHUNK", 700)
    assert same_bits(decode(16, many_blocks(BY_NAME["IQ2_XXS"])), whole)
    assert decode(16, torch.empty(0, 66, dtype=torch.uint8)).shape == (0, 256)
    assert decode(16, torch.empty(3, 0, dtype=torch.uint8)).shape == (3, 0)


def test_what_cannot_be_decoded() -> None:
    with pytest.raises(ValueError, match=r"decode: 4 is no type of tensors in GGUF files. Types: 0 F32, 1 F16"):
        decode(4, torch.zeros(1, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"decode: .*multiple of 66 bytes \(IQ2_XXS\), got torch.uint8 \[2, 67\]"):
        decode(16, torch.zeros(2, 67, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch.float32 \[2, 66\]"):
        decode(16, torch.zeros(2, 66))
    with pytest.raises(ValueError, match=r"on meta"):
        decode(16, torch.zeros(2, 66, dtype=torch.uint8, device="meta"))
