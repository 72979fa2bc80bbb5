"""What stands for the importance of experts that no token of the calibration reached: that of all experts of their layer.

The gate and the up projection of all experts read the same inputs, of which each expert sees a part. So what the others saw
tells more than equal weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile

import torch
from torch import Tensor

from isqtorch.policy.mixes import LISTED_EXPERT


def layer_importance(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the mean over the tokens of all experts of a layer. If none saw a token, all columns get the same weight.

    Args:
        sums, counts: see `Imatrix`.
        name: an entry: a stack of experts, or one of a list of experts.

    Returns:
        f32 `[K]`.
    """
    shape, listed = sums[name].shape, LISTED_EXPERT.fullmatch(name)
    beside = [name] if listed is None else _numbered(sums, *listed.groups())
    total, tokens = torch.zeros(shape[-1]), 0
    for each in beside:
        if sums[each].shape == shape:
            total += sums[each].reshape(-1, shape[-1])[counts[each] > 0].sum(0)
            tokens += int(counts[each].sum())
    return total / tokens if tokens else torch.ones(shape[-1])


def without_zeros(weights: Tensor, columns: int) -> Tensor:
    """Replace the zeros that mistral.rs stores for experts without data: by the mean of the others, or by 1.

    Args:
        weights: `[E, K]` or `[E * K]`.
        columns: K of the layer. Weights of another size are returned as they are, for the caller to refuse.
    """
    if not columns or weights.numel() % columns:
        return weights
    rows = weights.reshape(-1, columns)
    used = (rows != 0).any(dim=1, keepdim=True)
    others = rows.sum(0) / used.sum() if bool(used.any()) else rows.new_ones(columns)
    return torch.where(used, rows, others).reshape(weights.shape)


def _numbered(names: Mapping[str, Tensor], path: str, matrix: str | None) -> list[str]:
    """Return the names of the same matrix of all experts in a list, from the first one to the last one there."""
    candidates = (".".join(filter(None, [path, str(number), matrix])) for number in count())
    return list(takewhile(names.__contains__, candidates))
