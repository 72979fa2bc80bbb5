"""What an error in a layer's weights costs, and what it costs to store them in a format.

With W the weights, Q(W) what a format makes of them, r and c non-negative weights of rows and columns:

    cost = sum over n, k of  r[n] * c[k] * (Q(W) - W)[n, k]^2          (summed over the experts of a stack, each with its own)

Three choices of r and c, from the best to the one that needs nothing:

    "kl"      r c = curvature of the KL divergence (curvature.py): the cost is the divergence in nats that this layer alone adds
    "output"  r = 1 / N, c = importance, the mean squared input of each column: the cost is the mean squared error of the
              layer's outputs. Experts count by their share of the tokens; a table, which has no input, by 1 / K.
    "weight"  cost = N * K * relative squared error of the weights, times HEAD for the output head

On the demo model "kl" predicts the measured divergence of single layers within 15 %; "output" is off by a factor of 2.6, and
"weight" by 3.2 (standard deviations of the logarithm of the ratio).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat

from ..imatrix import Imatrix
from ..policy import LayerInfo

HEAD = 16.0
"""How much more an error of the output head counts where only weights are known: it reaches the logits undiluted. Measured on
the demo model (18); it buys the head two bits, about what llama.cpp's mixes give it."""

_SAMPLE = 1 << 21  # weights of a layer that are measured; of larger layers, rows are sampled
_LEAST_ROWS = 8  # of each matrix of a stack


class Weighing(NamedTuple):
    """How much errors count in the rows and columns of a matrix, or of each matrix of a stack."""

    rows: Tensor  # f64 [N] or [E, N]
    columns: Tensor  # f64 [K] or [E, K]


class Error(NamedTuple):
    """What a format does to a layer."""

    cost: float | None  # None: nothing is known about how much errors count here
    relative: float  # squared error of the weights over their squares


def of_outputs(members: Sequence[LayerInfo], imatrix: Imatrix) -> Weighing | None:
    """The weighing "output" of one weight, for all layers that share it; None where the matrix has no entry for it."""
    shape = members[0].shape
    experts = shape[0] if len(shape) == 3 else None
    columns = torch.zeros(shape[-1], dtype=torch.float64)
    known = False
    for layer in members:
        importance = imatrix.vector(layer.name, shape[-1], experts)
        if importance is not None:
            columns, known = columns + importance.double(), True
        elif layer.kind == "embedding":
            columns, known = columns + 1 / shape[-1], True
    if not known:
        return None
    rows = torch.full(shape[:-1], 1 / shape[-2], dtype=torch.float64)
    if experts is not None:
        rows *= imatrix.shares(members[0].name, experts)[:, None]
        columns = columns.expand(experts, -1)
    return Weighing(rows, columns)


def measure(
    weight: Tensor,
    formats: Sequence[QuantFormat],
    weighing: Weighing | None,
    importance: Tensor | None,
    rule: str | None,
) -> dict[str, Error]:
    """The error of a weight in several formats.

    Of a layer with more than 2 million weights only so many are measured: whole rows, the same ones every time, evenly spread
    where all rows count alike, and otherwise in proportion to what they count.

    Args:
        weight: `[N, K]` or `[E, N, K]`.
        weighing: None leaves the costs None.
        importance: for the formats that take it, `[K]` or `[E, K]`.
        rule: the rounding rule.
    """
    stack = weight if weight.dim() == 3 else weight[None]
    experts, rows, columns = stack.shape
    count = min(rows, max(_LEAST_ROWS, _SAMPLE // (experts * columns)))
    known = weighing or Weighing(torch.ones(rows, dtype=torch.float64), torch.ones(columns, dtype=torch.float64))
    row_weights, column_weights = known.rows.expand(experts, -1), known.columns.expand(experts, -1)
    cost = dict.fromkeys((fmt.name for fmt in formats), 0.0)
    squares, power = dict(cost), 0.0
    for e, matrix in enumerate(stack):
        picked, factors = _sample(row_weights[e], count)
        sample = matrix[picked.to(matrix.device)]
        exact = sample.float()
        power += float(exact.double().square().sum())
        vector = importance[e] if importance is not None and importance.dim() == 2 else importance
        for fmt in formats:
            wanted = None if vector is None or not fmt.takes_importance else vector.to(sample.device)
            packed = torch.ops.isqtorch.quantize(sample, fmt.name, wanted, rule)
            error = torch.ops.isqtorch.dequantize(packed, fmt.name, torch.float32).sub_(exact).square_()  # [S, K]
            by_row = error @ column_weights[e].to(error.device, error.dtype)
            cost[fmt.name] += float(by_row.double().cpu() @ factors)
            squares[fmt.name] += float(error.double().sum())
    return {
        name: Error(cost[name] if weighing is not None else None, squares[name] / power if power else 0.0) for name in cost
    }


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


def complete(errors: Sequence[Mapping[str, Error]], numels: Sequence[int], heads: Sequence[bool]) -> list[dict[str, float]]:
    """The costs of all layers in one unit, also where nothing is known about how much errors count.

    There the relative error decides, scaled by what the layers that are known have in common (the median of their ratio).
    Where none is known, the cost is "weight" of the module's docstring.

    Args:
        errors: of each layer, by format.
        numels: weights in each.
        heads: whether it is, or shares its weight with, the output head.
    """
    ratios = sorted(
        error.cost / (error.relative * numel)
        for by_format, numel in zip(errors, numels, strict=True)
        for error in by_format.values()
        if error.cost is not None and error.relative
    )
    scale = ratios[len(ratios) // 2] if ratios else 1.0
    out = []
    for by_format, numel, head in zip(errors, numels, heads, strict=True):
        factor = scale * numel * (HEAD if head else 1.0)
        out.append(
            {
                name: error.cost if error.cost is not None else factor * error.relative
                for name, error in by_format.items()
            }
        )
    return out
