"""Misuse of the operators: both implementations refuse the same, in the same words."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    implementation,
)

from isqtorch import ops

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


packed_q4k = torch.zeros(6, 144, dtype=torch.uint8)


FAULTS = {
    "integer weight": (
        ValueError,
        "weight must be one of",
        lambda o: o.quantize(torch.ones(2, 32, dtype=torch.int32), "q8_0"),
    ),
    "vector weight": (ValueError, r"at least 2 dimensions.*\[32\]", lambda o: o.quantize(torch.ones(32), "q8_0")),
    "K too short": (ValueError, "multiple of 256, got 288", lambda o: o.quantize(torch.ones(2, 288), "q4k")),
    "K zero": (ValueError, "multiple of 32, got 0", lambda o: o.quantize(torch.ones(2, 0), "q8_0")),
    "nan": (ValueError, r"weight\[1, 33\] is nan; q8_0 needs", lambda o: o.quantize(poisoned(float("nan")), "q8_0")),
    "inf": (ValueError, r"weight\[1, 33\] is inf; q4k needs", lambda o: o.quantize(poisoned(float("inf")), "q4k")),
    "-inf, hqq": (ValueError, r"weight\[1, 33\] is -inf; hqq4", lambda o: o.quantize(poisoned(-float("inf")), "hqq4")),
    "nan in bf16": (
        ValueError,
        r"weight\[1, 33\] is nan",
        lambda o: o.quantize(poisoned(float("nan")).bfloat16(), "afq4"),
    ),
    "importance length": (
        ValueError,
        r"importance must have shape \[256\].*got \[255\]",
        lambda o: o.quantize(torch.ones(2, 256), "q4k", torch.ones(255)),
    ),
    "importance per matrix": (
        ValueError,
        r"or \[3, 256\], one vector per matrix; got \[2, 256\]",
        lambda o: o.quantize(torch.ones(3, 2, 256), "q4k", torch.ones(2, 256)),
    ),
    "importance type": (
        ValueError,
        "importance must be a float tensor, got int64",
        lambda o: o.quantize(torch.ones(2, 32), "q4_0", torch.ones(32, dtype=torch.int64)),
    ),
    "importance negative": (
        ValueError,
        r"importance\[3\] is -0.5.*not negative",
        lambda o: o.quantize(torch.ones(2, 32), "q4_0", negative_at_3()),
    ),
    "rule": (
        ValueError,
        "afq4 has no rule 'best'.*'mlx'",
        lambda o: o.quantize(torch.ones(2, 64), "afq4", None, "best"),
    ),
    "rule of a family without": (
        ValueError,
        "q4k has no rule 'mlx'",
        lambda o: o.quantize(torch.ones(2, 256), "q4k", None, "mlx"),
    ),
    "f16 overflow": (
        ValueError,
        "afq4.f16.*too large for its 16-bit scale. Use afq4,",
        lambda o: o.quantize(torch.full((2, 64), 3e38), "afq4.f16"),
    ),
    "packed type": (
        ValueError,
        "packed weight is uint8, got int8",
        lambda o: o.dequantize(packed_q4k.char(), "q4k", torch.float32),
    ),
    "packed vector": (
        ValueError,
        r"at least 2 dim.*\[144\]",
        lambda o: o.dequantize(packed_q4k[0], "q4k", torch.float32),
    ),
    "packed cut": (
        ValueError,
        "multiple of 144 bytes, got 100",
        lambda o: o.dequantize(packed_q4k[:, :100], "q4k", torch.float32),
    ),
    "output dtype": (ValueError, "dtype must be one of.*int8", lambda o: o.dequantize(packed_q4k, "q4k", torch.int8)),
    "x too short": (
        ValueError,
        r"last dimension of x must be 256.*\[3, 255\]",
        lambda o: o.linear(torch.ones(3, 255), packed_q4k, "q4k"),
    ),
    "x of bytes": (
        ValueError,
        "x must be one of.*uint8",
        lambda o: o.linear(torch.ones(3, 256, dtype=torch.uint8), packed_q4k, "q4k"),
    ),
    "x scalar": (ValueError, "last dimension of x", lambda o: o.linear(torch.tensor(1.0), packed_q4k, "q4k")),
    "weight of linear stacked": (
        ValueError,
        r"2 dimensions \[N, row_bytes\]",
        lambda o: o.linear(torch.ones(3, 256), packed_q4k[None], "q4k"),
    ),
    "bias length": (
        ValueError,
        r"bias must have shape \[6\], got \[5\]",
        lambda o: o.linear(torch.ones(3, 256), packed_q4k, "q4k", torch.ones(5)),
    ),
    "id too large": (
        IndexError,
        r"ids\[1, 0\] is 6, but the table has 6 rows",
        lambda o: o.embedding(torch.tensor([[0], [6]]), packed_q4k, "q4k", torch.float32),
    ),
    "id negative": (
        IndexError,
        r"ids\[0\] is -1",
        lambda o: o.embedding(torch.tensor([-1]), packed_q4k, "q4k", torch.float32),
    ),
    "ids float": (
        ValueError,
        "ids must be int64 or int32, got float32",
        lambda o: o.embedding(torch.tensor([1.0]), packed_q4k, "q4k", torch.float32),
    ),
}


def poisoned(value: float) -> torch.Tensor:
    w = torch.ones(2, 256)
    w[1, 33] = w[1, 200] = value
    return w


def negative_at_3() -> torch.Tensor:
    v = torch.ones(32)
    v[3] = -0.5
    return v


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_both_implementations(name: str) -> None:
    kind, pattern, call = FAULTS[name]
    messages = []
    for implementation_name in ("reference", "native"):
        with pytest.raises(kind, match=pattern) as caught:
            call(implementation(implementation_name))
        messages.append(str(caught.value))
    if not name.startswith("K "):  # those name a way out that only the registry knows
        assert messages[0] == messages[1]


def test_unknown_format_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="q9k.*q4_0.*afq4"):
        ops.quantize(torch.ones(2, 256), "q9k")
