"""Decoding on a GPU, in the emulator: every format exactly as the reference has it, for `dequantize` and `embedding`."""

from __future__ import annotations

import pytest
import torch
from emulator import kernels
from helpers import ALL_FORMATS, DTYPES, FORMATS, weight

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format

every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def packed(fmt: QuantFormat, rows: int, blocks: int) -> torch.Tensor:
    """Quantized weights, with a row of zeros and one of large numbers."""
    w = weight(fmt, rows=rows, blocks=blocks)
    if rows > 2:
        w[0], w[1] = 0.0, w[1] * 1000.0
    return ops.quantize(w, fmt.name)


def random_bytes(fmt: QuantFormat, rows: int, blocks: int) -> torch.Tensor:
    """Codes and small integers of every value, under scales that are numbers; fp8 codes with NaN among them."""
    raw = torch.randint(0, 256, (rows * blocks, fmt.block_bytes), dtype=torch.uint8)
    for part in fmt.parts:
        if part.dtype.is_floating_point:
            numbers = (torch.randn(rows * blocks, part.count) * 2).to(part.dtype)
            raw[:, part.offset : part.offset + part.nbytes] = numbers.view(torch.uint8)
    return raw.view(rows, -1)


def decode(
    fmt: QuantFormat, data: torch.Tensor, dtype: torch.dtype, ids: torch.Tensor | None = None, odd: int = 0
) -> torch.Tensor:
    """Through the kernel. `odd`: elements by which the output misses an address that is a multiple of 16."""
    rows, k = data.shape[0], fmt.in_features(data.shape[1])
    count = rows if ids is None else ids.numel()
    with kernels.Memory() as memory:
        out = memory.new((count * k + odd,), dtype, "out")
        before = out[:odd].clone()
        job = {"weight": memory.put(data, "weight", align=kernels.facts(fmt.name)["align"]), "out": out[odd:]}
        if ids is not None:
            wide = ids.dtype == torch.int64
            job |= {"ids": memory.put(ids, "ids", align=4), "wide_ids": wide, "count": count}
        kernels.run("decode", fmt.name, rows=rows, k=k, dtype=dtype, **job)
        assert torch.equal(out[:odd].view(torch.uint8), before.view(torch.uint8)), "wrote in front of the output"
        return out[odd:].clone().view(count, k)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits, but for the payload of NaN."""
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num().view(torch.uint8), want.nan_to_num().view(torch.uint8))


def test_the_table_has_every_format() -> None:
    names = kernels.names()
    assert sorted(names) == sorted(fmt.name for fmt in ALL_FORMATS)
    for fmt in ALL_FORMATS:
        facts = kernels.facts(fmt.name)
        assert (facts["block"], facts["block_bytes"]) == (fmt.block, fmt.block_bytes), fmt.name
        assert fmt.block_bytes % facts["align"] == 0, fmt.name
        assert facts["has_rules"] == (fmt.solver == "affine"), fmt.name


@every_variant
@every_dtype
def test_dequantize_is_exact(fmt: QuantFormat, dtype: torch.dtype) -> None:
    for data in (packed(fmt, 7, 3), random_bytes(fmt, 3, 1)):
        same(decode(fmt, data, dtype), ops.reference.dequantize(data, fmt.name, dtype))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_rows_of_more_than_a_block_of_threads(fmt: QuantFormat) -> None:
    """The second and third piece of 2048 weights; rows of an embedding have such pieces, too."""
    data = packed(fmt, 2, 4096 // fmt.block + 1)
    want = ops.reference.dequantize(data, fmt.name, torch.bfloat16)
    same(decode(fmt, data, torch.bfloat16), want)
    same(decode(fmt, data, torch.bfloat16, torch.tensor([1, 0])), want[[1, 0]])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@every_dtype
def test_an_output_need_not_align(fmt: QuantFormat, dtype: torch.dtype) -> None:
    data = packed(fmt, 2, 2)
    same(decode(fmt, data, dtype, odd=1), ops.reference.dequantize(data, fmt.name, dtype))


@every_variant
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_embedding_is_exact(fmt: QuantFormat, integers: torch.dtype) -> None:
    data = packed(fmt, 5, 2)
    ids = torch.tensor([4, 0, 0, 3, 4, 4, 1], dtype=integers)
    same(decode(fmt, data, torch.float16, ids), ops.reference.embedding(ids, data, fmt.name, torch.float16))


def test_nothing_to_do() -> None:
    with kernels.Memory() as memory:
        out = memory.new((32,), torch.float32, "out")
        kernels.run("decode", "q4_0", rows=2, k=32, out=out, ids=memory.new((1,), torch.int32, "ids"), count=0)
        kernels.run("decode", "q4_0", rows=0, k=32, out=out)
        assert out.isnan().all()


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**40)])
def test_an_id_that_names_no_row_ends_the_launch(bad: int) -> None:
    fmt = get_format("q8_0")
    with pytest.raises(kernels.KernelError, match="an id names no row of the weight: block"):
        decode(fmt, packed(fmt, 5, 1), torch.float32, torch.tensor([0, bad, 1]))


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_order_does_not_matter(fmt: QuantFormat, order: str) -> None:
    data = packed(fmt, 3, 2)
    with kernels.schedule(order):
        same(decode(fmt, data, torch.float32), ops.reference.dequantize(data, fmt.name, torch.float32))
