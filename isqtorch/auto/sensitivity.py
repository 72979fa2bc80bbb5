"""The cost of storing the weights of a layer in a format.

W are the weights [N, K], and D = Q(W) - W is the error of the format. The cost is the first of these measures that is
known:

    "kl"      sum of F[n, k] * D[n, k]^2 / 2, where F is the curvature of the KL divergence (curvature.py). This is the
              divergence that the layer alone adds, in nats per token.
    "output"  N * K * (sum of h[k] * D[n, k]^2) / (sum of h[k] * W[n, k]^2), where h is the importance: the mean squared
              input of each column. This is the relative squared error of the layer's outputs, times its number of
              weights. An expert is weighted by its share of the tokens.
    "weight"  the same without importance: h = 1

With the rule "feedback", errors of different columns make up for each other. D[n] H D[n]' is then in the place of the
sums over k: divided by the trace of H for "kl", where F[n, k] is about R[n] H[k, k] / trace(H).

The last two measures ignore the layers that follow. The error of the output head goes straight into the logits, so its
cost is multiplied by HEAD. On the demo model "kl" predicts the measured divergence of single layers to about 12 %. The
others predict it to a factor of 3, after a common scale (both are standard deviations of the logarithm of the ratio).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat
from isqtorch.importance.feedback import Shelf
from isqtorch.importance.inputs import LayerMoments
from isqtorch.quantizers import scale_rule, uses_importance

HEAD = 16.0
"""18 was measured on the demo model. It gives the head about two more bits, as llama.cpp's mixes do."""

_SAMPLE = 1 << 21  # largest number of weights measured in a layer; of larger layers rows are sampled
_FED_SAMPLE = 1 << 18  # the same with feedback, which takes ten times as long
_LEAST_ROWS = 8  # smallest sample of each matrix of a stack


class Weighing(NamedTuple):
    """Factors of squared errors in a matrix, or in each matrix of a stack: rows[n] * columns[k] for weight [n, k]."""

    rows: Tensor  # f64 [N] or [E, N]
    columns: Tensor  # f64 [K] or [E, K]


class ShelvedMoments(NamedTuple):
    """The moments of one layer, for the rule "feedback"."""

    shelf: Shelf
    layer: LayerMoments


class Error(NamedTuple):
    """The errors of a layer in a format."""

    cost: float | None  # "kl"; None: not known
    output: float  # sum of squared errors over sum of squares, both weighted by importance; else equal to `weight`
    weight: float  # sum of squared errors over sum of squares


class Sums(NamedTuple):
    """Sums of squared errors, by format, and of squared weights, each with the factors of all three measures."""

    errors: dict[str, Tensor]  # f64 [3]
    powers: Tensor  # f64 [3]
    knows_cost: bool


def measure_errors(
    weight: Tensor,
    formats: Sequence[QuantFormat],
    weighing: Weighing | None,
    importance: Tensor | None,
    shares: Tensor | None,
    rules: Mapping[str, str | None],
    pieces: int = 1,
    moments: ShelvedMoments | None = None,
    first: int = 0,
) -> Sums:
    """The errors of a weight in several formats. Importance is used by formats that take it.

    Of a layer with more than 2 million weights, or 262,144 with feedback, a sample of about that size is measured. It
    consists of whole rows, always the same ones: evenly spread, or with a weighing in proportion to their factors.

    Args:
        weight: `[N, K]` or `[E, N, K]`.
        formats: the formats to try.
        weighing: the factors of "kl"; None leaves the costs None.
        importance: `[K]` or `[E, K]`.
        shares: each expert's share of the tokens, `[E]`; None: equal shares.
        rules: the rounding rule of each format, by its name.
        pieces: number of pieces in which the layer is measured; `weight` is one of them. They share the sample size.
        moments: the layer's moments, if it will be packed with feedback.
        first: number of the first expert of `weight` in its stack.
    """
    stack = weight if weight.dim() == 3 else weight[None]
    experts, rows, columns = stack.shape
    size = _SAMPLE if moments is None else _FED_SAMPLE
    count = min(rows, max(_LEAST_ROWS, size // (pieces * experts * columns)))
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

        expert = None if weight.dim() == 2 else first + e
        if moments is not None and vector is not None and moments.layer.enough(expert):
            h2 = moments.layer.matrix(expert).to(exact.device)
            factor = moments.shelf.factor(moments.layer, expert, slice(None), exact.device)

            def joint(
                off: Tensor,
                h2: Tensor = h2,
                factors: Tensor = factors,
                share: float = 1.0 if shares is None else float(shares[e]),
            ) -> Tensor:
                by_row = ((off @ h2) * off).sum(1).double().cpu()  # [S]
                kl = by_row @ factors / max(float(h2.trace()), 1e-30)
                return torch.stack([kl, by_row.sum() * share, off.double().square().sum().cpu()])

            powers += joint(exact)
            for fmt in formats:
                packed = torch.ops.isqtorch.quantize_feedback(
                    sample, fmt.name, factor, vector.to(sample.device), scale_rule(fmt)
                )
                decoded = torch.ops.isqtorch.dequantize(packed, fmt.name, torch.float32)
                sums[fmt.name] += joint(decoded.sub_(exact))
            continue
        powers += summed(exact.square())
        for fmt in formats:
            rule = rules[fmt.name]
            wanted = None if vector is None or not uses_importance(fmt, rule) else vector.to(sample.device)
            packed = torch.ops.isqtorch.quantize(sample, fmt.name, wanted, rule)
            decoded = torch.ops.isqtorch.dequantize(packed, fmt.name, torch.float32)
            sums[fmt.name] += summed(decoded.sub_(exact).square_())
    return Sums(sums, powers, weighing is not None)


def errors_of(parts: Sequence[Sums]) -> dict[str, Error]:
    """The errors of a layer, by format, from the sums of its pieces."""
    powers = torch.stack([part.powers for part in parts]).sum(0)
    out = {}
    for name in parts[0].errors:
        cost, output, plain = torch.stack([part.errors[name] for part in parts]).sum(0).tolist()
        relative = plain / float(powers[2]) if powers[2] else 0.0
        weighed = output / float(powers[1]) if powers[1] else relative
        out[name] = Error(cost if any(part.knows_cost for part in parts) else None, weighed, relative)
    return out


def _sample(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sample up to `count` of N rows, with factors such that weighted sums over them estimate sums over all rows.

    Args:
        weights: factor of each row, f64 `[N]`, not negative.
        count: size of the sample.

    Returns:
        The rows, int64 `[S]` with S <= count and no repetitions, and their factors, f64 `[S]`.
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

    "kl" is not known for layers that received no token of the text. They get the cost "output", scaled by the median
    ratio of the two costs over all other layers.

    Args:
        errors: the errors of each layer, by format.
        numels: number of weights of each layer.
        heads: whether each layer is the output head or shares its weight.
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
