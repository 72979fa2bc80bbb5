"""Misuse of `quantize_feedback`, for test_ops_faults.py."""

from __future__ import annotations

import torch
from torch import Tensor


def poisoned(value: float) -> Tensor:
    w = torch.ones(2, 256)
    w[1, 33] = w[1, 200] = value
    return w


def uneven_rows() -> Tensor:
    """No format can represent these exactly."""
    return torch.arange(1, 513).view(2, 256).float().sqrt()


def with_value(i: int, j: int, value: float, size: int = 64) -> Tensor:
    """The unit matrix with another value."""
    factor = torch.eye(size)
    factor[i, j] = value
    return factor


FEEDBACK_FAULTS = {
    "rule feedback": (
        ValueError,
        "rule 'feedback' needs the second moments of the layer's inputs. Use quantize_feedback",
        lambda o: o.quantize(torch.ones(2, 64), "afq4", None, "feedback"),
    ),
    "feedback for a stack": (
        ValueError,
        r"one matrix \[N, K\], got shape \[3, 2, 64\].*one by one",
        lambda o: o.quantize_feedback(torch.ones(3, 2, 64), "afq4", torch.eye(64), torch.ones(64)),
    ),
    "K too short, feedback": (
        ValueError,
        "multiple of 256, got 64|multiple of 256",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "q4k", torch.eye(64), torch.ones(64)),
    ),
    "feedback, importance length": (
        ValueError,
        r"importance must have shape \[64\].*got \[63\]",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "afq4", torch.eye(64), torch.ones(63)),
    ),
    "feedback, rule": (
        ValueError,
        "q4k has no rule 'search'",
        lambda o: o.quantize_feedback(torch.ones(2, 256), "q4k", torch.eye(256), torch.ones(256), "search"),
    ),
    "factor shape": (
        ValueError,
        r"factor must be float32 \[64, 64\] for a weight of 64 columns, got float32 \[32, 32\]. Is this",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "afq4", torch.eye(32), torch.ones(64)),
    ),
    "factor type": (
        ValueError,
        r"factor must be float32.*got float64 \[64, 64\]",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "afq4", torch.eye(64).double(), torch.ones(64)),
    ),
    "factor's diagonal": (
        ValueError,
        r"factor\[7, 7\] is 0; a factor has zeros below its diagonal, positive numbers on it",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "afq4", with_value(7, 7, 0), torch.ones(64)),
    ),
    "factor's diagonal, negative": (
        ValueError,
        r"factor\[7, 7\] is -1; a factor has",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "afq4", with_value(7, 7, -1), torch.ones(64)),
    ),
    "factor's diagonal, infinite": (
        ValueError,
        r"factor\[7, 7\] is inf; a factor has",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "afq4", with_value(7, 7, float("inf")), torch.ones(64)),
    ),
    "factor's lower part": (
        ValueError,
        r"factor\[1, 0\] is 1; a factor has zeros below",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "afq4", torch.ones(64, 64).tril(), torch.ones(64)),
    ),
    "factor's NaN": (
        ValueError,
        r"factor\[3, 5\] is nan; a factor has zeros below",
        lambda o: o.quantize_feedback(torch.ones(2, 64), "afq4", with_value(3, 5, float("nan")), torch.ones(64)),
    ),
    "nan, feedback": (
        ValueError,
        r"weight\[1, 33\] is nan; q8_0 needs",
        lambda o: o.quantize_feedback(poisoned(float("nan")), "q8_0", torch.eye(256), torch.ones(256)),
    ),
    "f16 overflow, feedback": (
        ValueError,
        r"block of q4_0 from weight\[1, 0\] on holds values too large for its 16-bit scale",
        lambda o: o.quantize_feedback(poisoned(3e38), "q4_0", torch.eye(256), torch.ones(256)),
    ),
    "f16 overflow, by what is carried": (
        ValueError,
        r"block of q4_0 from weight\[0, 32\] on holds values too large for its 16-bit scale",
        lambda o: o.quantize_feedback(torch.full((2, 64), 0.3), "q4_0", with_value(3, 40, 1e30), torch.ones(64)),
    ),
    "carried errors": (
        ValueError,
        r"errors carried to the block of fp8 from weight\[0, 128\] on are larger than float32 can hold",
        lambda o: o.quantize_feedback(uneven_rows() * 1e37, "fp8", with_value(3, 200, 1e30, 256), torch.ones(256)),
    ),
    "carried errors in a block": (
        ValueError,
        r"errors carried to the block of fp8 from weight\[0, 0\] on are larger than float32 can hold",
        lambda o: o.quantize_feedback(uneven_rows() * 1e37, "fp8", with_value(3, 20, 1e30, 256), torch.ones(256)),
    ),
}
"""Name -> exception, words of its message, and the call. Names as in test_ops_faults.py."""
