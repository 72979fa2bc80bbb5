"""What an error in a layer's weights costs, and what it costs to store them in a format.

With W the weights, D = Q(W) - W the error of a format, and K columns in each of N rows, the cost is the best of these that is known:

    "kl"      sum of F[n, k] * D[n, k]^2 / 2, with F the curvature of the KL divergence (curvature.py): the divergence that this
              layer alone adds, in nats per token
    "output"  N * K * (sum of h[k] * D[n, k]^2) / (sum of h[k] * W[n, k]^2), with h the importance (the mean squared input of
              each column): the relative squared error of the layer's outputs, for every weight in it. Experts count by their
              share of the tokens.
    "weight"  the same without importance, h = 1

The last two know nothing of what lies behind a layer. So they count the output head, whose error reaches the logits undiluted,
HEAD times. On the demo model "kl" predicts the measured divergence of single layers to about 12 %, the others, up to a
common factor, to a factor of 3 (standard deviations of the logarithm of the ratio).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat
from isqtorch.quantizers import has_rule, uses_importance

HEAD = 16.0
"""Measured on the demo model (18); it buys the head two bits, about what llama.cpp's mixes give it."""

_SAMPLE = 1 << 21  # weights of a layer that are measured; of larger layers, rows are sampled
_LEAST_ROWS = 8  # of each matrix of a stack


class Weighing(NamedTuple):
    """How much squared errors count in the rows and columns of a matrix (their product), or of each matrix of a stack."""

    rows: Tensor  # f64 [N] or [E, N]
    columns: Tensor  # f64 [K] or [E, K]


class Error(NamedTuple):
    """What a format does to a layer."""

    cost: float | None  # "kl"; None: not known
    output: float  # squared error over squares, both weighed by importance; without importance the same as `weight`
    weight: float  # squared error over squares


class Sums(NamedTuple):
    """Squared errors of one matrix or more, by format, and squared weights: counted for "kl", by importance, and plainly."""

    errors: dict[str, Tensor]  # f64 [3]
    powers: Tensor  # f64 [3]
    knows_cost: bool


def measure(
    weight: Tensor,
    formats: Sequence[QuantFormat],
    weighing: Weighing | None,
    importance: Tensor | None,
    shares: Tensor | None,
    rule: str | None,
    pieces: int = 1,
) -> Sums:
    """The error of a weight in several formats, each made with importance where the format takes it.

    Of a layer with more than 2 million weights only so many are measured: whole rows, the same ones every time, evenly spread,
    or with a weighing in proportion to what they count.

    Args:
        weight: `[N, K]` or `[E, N, K]`.
        weighing: for "kl"; None leaves the costs None.
        importance: `[K]` or `[E, K]`.
        shares: of the tokens, for each expert of a stack, `[E]`; None: equal ones.
        rule: the rounding rule, for the formats that have it.
        pieces: in how many pieces, of which this is one, the layer is measured; the sample is shared among them.
    """
    stack = weight if weight.dim() == 3 else weight[None]
    experts, rows, columns = stack.shape
    count = min(rows, max(_LEAST_ROWS, _SAMPLE // (pieces * experts * columns)))
    known = weighing or Weighing(torch.ones(rows, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64))
    row_weights, column_weights = known.rows.expand(experts, -1), known.columns.expand(experts, -1)
    sums = {fmt.name: torch.zeros(3, dtype=torch.float64) for fmt in formats}  # cost, output, weight
    powers = torch.zeros(3, dtype=torch.float64)
    for e, matrix in enumerate(stack):
        picked, factors = _sample(row_weights[e], count)
        sample = matrix[picked.to(matrix.device)]
        exact = sample.float()
        vector = importance[e] if importance is not None and importance.dim() == 2 else importance
        h = torch.ones(columns) if vector is None else vector.float()
        h = h * (1.0 if shares is None else float(shares[e]))
        by = torch.stack([column_weights[e].float(), h, torch.ones(columns)], dim=1).to(exact.device)  # [K, 3]

        def summed(squares: Tensor, by: Tensor = by, factors: Tensor = factors) -> Tensor:
            by_row = (squares @ by).double().cpu()  # [S, 3]
            return torch.stack([by_row[:, 0] @ factors, by_row[:, 1].sum(), by_row[:, 2].sum()])

        powers += summed(exact.square())
        for fmt in formats:
            own_rule = rule if has_rule(fmt, rule) else None
            wanted = None if vector is None or not uses_importance(fmt, own_rule) else vector.to(sample.device)
            packed = torch.ops.isqtorch.quantize(sample, fmt.name, wanted, own_rule)
            decoded = torch.ops.isqtorch.dequantize(packed, fmt.name, torch.float32)
            sums[fmt.name] += summed(decoded.sub_(exact).square_())
    return Sums(sums, powers, weighing is not None)


def errors_of(parts: Sequence[Sums]) -> dict[str, Error]:
    """The errors of a layer from those of its pieces, by format."""
    powers = torch.stack([part.powers for part in parts]).sum(0)
    out = {}
    for name in parts[0].errors:
        cost, output, plain = torch.stack([part.errors[name] for part in parts]).sum(0).tolist()
        relative = plain / float(powers[2]) if powers[2] else 0.0
        weighed = output / float(powers[1]) if powers[1] else relative
        out[name] = Error(cost if any(part.knows_cost for part in parts) else None, weighed, relative)
    return out


def _sample(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` rows of N and what each stands for, so that sums over them estimate sums over all rows.

    Args:
        weights: f64 `[N]`, not negative.

    Returns:
        int64 `[S]`, S <= count, without repetitions, and f64 `[S]`.
    """
    total = float(weights.sum())
    if count >= len(weights) or not total:
        return torch.arange(len(weights))[:count], weights[:count]
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) * (total / count)
    at = torch.searchsorted(weights.cumsum(0), middles).clamp_max_(len(weights) - 1)
    picked, times = at.unique(return_counts=True)
    return picked, times.double() * (total / count)


def costs(
    errors: Sequence[Mapping[str, Error]], numels: Sequence[int], heads: Sequence[bool]
) -> list[dict[str, float]]:
    """The costs of all layers, by format, in one unit.

    Layers of which "kl" is not known, because no token of the text came to them, have the cost "output", scaled by what those
    that are known have in common (the median of the ratio).

    Args:
        errors: of each layer, by format.
        numels: weights in each.
        heads: whether it is, or shares its weight with, the output head.
    """
    ratios = sorted(
        error.cost / (error.output * numel)
        for by_format, numel in zip(errors, numels, strict=True)
        for error in by_format.values()
        if error.cost is not None and error.output
    )
    scale = ratios[len(ratios) // 2] if ratios else 1.0
    return [
        {
            name: error.cost if error.cost is not None else scale * numel * (HEAD if head else 1.0) * error.output
            for name, error in by_format.items()
        }
        for by_format, numel, head in zip(errors, numels, heads, strict=True)
    ]
