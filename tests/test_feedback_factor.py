"""The factor of second moments for error feedback, and that a wrong one would be noticed."""

from __future__ import annotations

import pytest
import torch
from feedback_cases import by_feedback, columns_for, moments, ratio, weights
from torch import Tensor

from isqtorch.formats import get_format
from isqtorch.quantizers import feedback_factor

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

# ---- the factor -----------------------------------------------------------------------------------------------------------


def test_factor_of_moments() -> None:
    h = moments(300)
    v = feedback_factor(h, 0.02)
    assert torch.equal(v, v.triu()) and float(v.diagonal().max()) == 1
    damped = h.double() + 0.02 * h.diagonal().double().mean() * torch.eye(300)
    damped[5, 5] += 1
    unit = v.double().fill_diagonal_(1)
    product = unit @ v.diagonal().double().diag() @ unit.t()
    torch.testing.assert_close(product / product.trace() * damped.trace(), damped, rtol=1e-4, atol=1e-5)
    assert torch.equal(feedback_factor(torch.zeros(8, 8)), torch.eye(8))
    assert torch.equal(feedback_factor(torch.tensor([[3.0]])), torch.ones(1, 1))


def test_moments_of_few_tokens() -> None:
    """They are singular. Without damping, Cholesky fails, so the damping is raised."""
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(3))
    h = x.t() @ x / 20
    assert int(torch.linalg.cholesky_ex(h).info) != 0
    fmt, w = get_format("q4_0"), weights(16, 256)
    for damping in (0.01, 0.0):
        v = feedback_factor(h, damping)
        assert bool(v.isfinite().all())
        assert ratio(w, fmt, h, v) < 0.2


BAD_MOMENTS = {
    "NaN": (torch.full((4, 4), float("nan")), r"moments\[0, 0\] is nan"),
    "NaN beside the diagonal": (
        torch.eye(4).index_fill(1, torch.tensor(2), float("nan")).fill_diagonal_(1),
        "symmetric",
    ),
    "negative": (torch.tensor([[1.0, 0], [0, -1]]), r"moments\[1, 1\] is -1"),
    "not symmetric": (torch.tensor([[1.0, 0.5], [0, 1]]), "symmetric"),
    "not square": (torch.ones(2, 3), r"\[K, K\].*\[2, 3\]"),
    "integers": (torch.ones(2, 2, dtype=torch.int64), "float matrix"),
    "none": (torch.ones(0, 0), r"\[0, 0\]"),
    "indefinite": (torch.tensor([[1.0, 5], [5, 1]]), "not positive definite"),
}


@pytest.mark.parametrize("name", BAD_MOMENTS)
def test_bad_moments_are_refused(name: str) -> None:
    h, words = BAD_MOMENTS[name]
    with pytest.raises(ValueError, match=f"feedback_factor: .*{words}"):
        feedback_factor(h)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), 2.0])
def test_bad_damping_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match="feedback_factor: damping must be from 0 to 1"):
        feedback_factor(torch.eye(4), damping)


# ---- faults that one could make -------------------------------------------------------------------------------------------

WRONG_FACTORS = {
    "of another layer": lambda h: feedback_factor(moments(len(h), seed=99)),
    "of columns in reverse order": lambda h: feedback_factor(h.flip(0, 1)),
    "of the matrix that is not turned": lambda h: _factor(torch.linalg.cholesky(_damped(h))).t().contiguous(),
    "of the inverse": lambda h: _factor(torch.linalg.cholesky(torch.linalg.inv(_damped(h)), upper=True).t()).t(),
    "with signs changed": lambda h: 2 * feedback_factor(h).diagonal().diag() - feedback_factor(h),
    "without effect": lambda h: torch.eye(len(h)),
}
"""Each is upper triangular, so that only the result can show that it is wrong."""


def _damped(h: Tensor) -> Tensor:
    return h + torch.diag(0.01 * h.diagonal().mean() + (h.diagonal() == 0).float())


def _factor(lower: Tensor) -> Tensor:
    return (lower / lower.diagonal()).diagonal_scatter(lower.diagonal().square())


@pytest.mark.parametrize("name", WRONG_FACTORS)
def test_a_wrong_factor_would_be_noticed(name: str) -> None:
    """The bound of `test_correlated_inputs` is not kept."""
    for fmt in (get_format("q4_0"), get_format("q4k"), get_format("afq4")):
        h, w = moments(columns_for(fmt)), weights(16, columns_for(fmt))
        assert not ratio(w, fmt, h, WRONG_FACTORS[name](h)) < 0.75


@pytest.mark.parametrize("diagonal", ["of ones", "inverted", "in reverse order"])
def test_a_wrong_diagonal_would_be_noticed(diagonal: str) -> None:
    """It says which columns matter when they are ordered and chosen again."""
    h, w = moments(512), weights(64, 512)
    right = feedback_factor(h)
    d = right.diagonal()
    wrong = {"of ones": torch.ones(512), "inverted": d.min() / d, "in reverse order": d.flip(0)}[diagonal]
    for name in ("q4_0", "q4k", "afq4"):
        fmt = get_format(name)
        assert ratio(w, fmt, h, right.diagonal_scatter(wrong)) > 1.03 * ratio(w, fmt, h, right), name


def test_a_transposed_factor_is_refused() -> None:
    h = moments(256)
    with pytest.raises(ValueError, match=r"factor\[1, 0\] is .*zeros below its diagonal"):
        by_feedback(weights(2, 256), get_format("q4_0"), h, feedback_factor(h).t())
