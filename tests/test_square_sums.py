"""The operator behind calibration: sums of squared columns, by group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import close, squares

from isqtorch import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 64), (0, 8), (64, 2500), (513, 256)], ids=str)
def test_square_sums(shape: tuple[int, ...], dtype: torch.dtype, impl: Any) -> None:
    x = torch.randn(shape).to(dtype)
    close(impl.square_sums(x)[0], squares(x))
    close(impl.square_sums(x.transpose(0, -1))[0], squares(x.transpose(0, -1))) if shape[0] else None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_square_sums_of_groups(dtype: torch.dtype, impl: Any) -> None:
    x = torch.randn(50, 130).bfloat16()
    groups = torch.randint(0, 6, (50, 3), dtype=dtype)  # 5 is nobody
    sums = impl.square_sums(x, groups, 5)
    assert sums.shape == (5, 130)
    for group in range(5):
        rows = x.repeat_interleave((groups == group).sum(1), dim=0)
        close(sums[group], squares(rows))


def test_square_sums_refuses() -> None:
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got int64"):
        ops.square_sums(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"groups must have shape \[2, slots\], got \[3, 1\]"):
        ops.square_sums(torch.ones(2, 2), torch.zeros(3, 1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="groups must be int64 or int32, got float32"):
        ops.square_sums(torch.ones(2, 2), torch.zeros(2, 1), 2)


def test_square_sums_is_a_proper_op() -> None:
    torch.library.opcheck(torch.ops.isqtorch.square_sums.default, (torch.randn(4, 8), torch.zeros(4, 2).long(), 3))
