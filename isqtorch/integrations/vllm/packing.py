"""Pack float weights that vLLM has loaded."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import isqtorch.ops  # noqa: F401  (registers torch.ops.isqtorch)
from isqtorch.formats import QuantFormat
from isqtorch.inplace.damage import damage, damage_alarms, damage_reason
from isqtorch.text import cause

from .formats import OP


def packed(weight: Tensor, fmt: QuantFormat, path: str) -> Tensor:
    """The packed rows of float `[..., N, K]`. Warns if many values are lost.

    Raises:
        ValueError: the weight has values that cannot be packed; the message names the layer.
    """
    try:
        found: Tensor = torch.ops.isqtorch.quantize(weight, fmt.name)
    except ValueError as error:
        raise ValueError(f"{OP}: {path}: {cause(error)}") from None
    lost = damage(weight, found, fmt)
    if lost is not None:
        reasons = {f"{path} ({fmt.name})": damage_reason([lost], fmt)}
        for message in damage_alarms(reasons, OP):
            warnings.warn(message, stacklevel=2)
    return found
