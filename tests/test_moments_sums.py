"""The sums of x x' and the sample of held-out rows, by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isqtorch.importance.second import HeldOut, Second


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("steps", [(3, 2), (40, 300), (1,) * 70, (500,)])
def test_sums_are_the_same_however_the_rows_come(steps: tuple[int, ...], sparse: bool) -> None:
    x = torch.randn(sum(steps), 32).to(torch.bfloat16)
    second = Second(32, sparse=sparse)
    for part in x.split(steps):
        second.add(part)
    second.finish()
    want = x.float().t() @ x.float()
    close(second.matrix(), want)
    close(second.diagonal(), want.diagonal())
    assert second.count == len(x) and (second.total is None) == (sparse and len(x) < 32)


def test_rows_that_are_changed_later_are_kept_as_they_were() -> None:
    x = torch.ones(2, 4)
    second, held = Second(4), HeldOut(4)
    second.add(x)
    held.add(x, torch.ones(2), torch.zeros(2, dtype=torch.bool))
    x.zero_()
    assert torch.equal(second.matrix(), torch.full((4, 4), 2.0)) and torch.equal(held.rows[0], torch.ones(2, 4))


def test_held_out_rows_are_bounded() -> None:
    """And the first tokens keep their share of the weight."""
    held = HeldOut(4, most=100)
    first = torch.tensor([True] + [False] * 32)
    for number in range(50):
        held.add(torch.full((33, 4), float(number)), torch.ones(33), first)
    held.finish()
    assert 50 < len(held) <= 200
    assert abs(float(held.first[0].float().mean()) - 1 / 33) < 0.02
    assert len(held.rows[0][:, 0].unique()) > 5  # of many windows
