"""What the formats' structs in csrc/cuda/formats give a product, in the emulator: codes and scales make up the reference's
weights, wherever a row lies in memory and whether or not its last chunk of 256 weights is whole."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from emulator import kernels
from helpers import ALL_FORMATS, FORMATS
from test_cuda_decode import packed, random_bytes

from isqtorch import ops
from isqtorch.formats import QuantFormat

HERE = Path(__file__).resolve()
every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
both_elements = pytest.mark.parametrize("bf16", [False, True], ids=["f16", "bf16"])


def take_apart(fmt: QuantFormat, row: torch.Tensor, bf16: bool, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes `[K]` of a packed row, and per weight its group's scale and offset `[K, 2]`.

    `shift`: bytes that follow the row in memory, up to an address that is a multiple of 16.
    """
    k = fmt.in_features(row.numel())
    with kernels.Memory() as memory:
        align = kernels.facts(fmt.name)["align"]
        data = memory.put(torch.cat([row, row.new_full((shift,), 0xFF)]), "row", align=align)[: row.numel()]
        codes = memory.new((k,), torch.float32, "codes")
        affine = memory.new((k // 16, 2), torch.float32, "affine")
        take = kernels.library().take_row_apart
        take.argtypes = [ctypes.c_char_p, _POINTER, ctypes.c_int64, ctypes.c_bool, _POINTER, _POINTER]
        take.restype = ctypes.c_int
        group = take(fmt.name.encode(), data.data_ptr(), k, bf16, codes.data_ptr(), affine.data_ptr())
        error = kernels.library().emulator_error
        error.restype = ctypes.c_char_p
        assert error() == b""
        assert group in (16, 32)
        return codes.clone(), affine[: k // group].repeat_interleave(group, 0)


_POINTER = ctypes.c_void_p


def check(fmt: QuantFormat, row: torch.Tensor, bf16: bool, shift: int = 0) -> None:
    codes, affine = take_apart(fmt, row, bf16, shift)
    want = ops.reference.dequantize(row[None], fmt.name, torch.float32)[0]
    got = affine[:, 0] * codes + affine[:, 1]
    assert torch.equal(got.isnan(), want.isnan())
    # each number of a group may be rounded once: the error is one of the larger of the two terms
    size = torch.maximum((affine[:, 0] * codes).abs(), affine[:, 1].abs()).nan_to_num()
    assert ((got - want).nan_to_num().abs() <= size * 3 * 2**-24).all()
    number = torch.bfloat16 if bf16 else torch.float16
    if not fmt.solver == "fp8":
        assert torch.equal(codes, codes.round()) and codes.abs().max() <= 255
    assert torch.equal(codes, codes.nan_to_num().to(number).float()) or fmt.bits == 8


@every_variant
@both_elements
def test_codes_and_scales_make_up_the_weights(fmt: QuantFormat, bf16: bool) -> None:
    """Three chunks, the last of which is one block long."""
    for data in (packed(fmt, 3, 512 // fmt.block + 1), random_bytes(fmt, 3, 512 // fmt.block + 1)):
        for row in data:
            check(fmt, row, bf16)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@both_elements
def test_a_row_lies_anywhere(fmt: QuantFormat, bf16: bool) -> None:
    """At all addresses that its blocks align to, and in rows of every number of blocks up to a chunk's."""
    for shift in range(0, 16, kernels.facts(fmt.name)["align"]):
        check(fmt, random_bytes(fmt, 1, 1 + shift % max(1, 256 // fmt.block))[0], bf16, shift)


SANITIZED = "test_a_row_lies_anywhere or test_an_output_need_not_align or test_rows_of_more_than_a_block_of_threads"


@pytest.mark.slow  # compiles all kernels again
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_have_nothing_to_say(variant: str) -> None:
    kernels.sanitized_pytest(variant, str(HERE), str(HERE.with_name("test_cuda_decode.py")), "-k", SANITIZED)
