"""The vectors of norms that `refine_` has changed: their values from before, which belong to the float weights.

The record is an attribute of the model, so copy and pickle keep it. It is not part of the state dict.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_isq_vectors"


def originals(model: nn.Module) -> dict[str, Tensor]:
    """{name of a parameter that was refined: its values from before}."""
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, dict) else {}


def remember(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Add to the record, unless the parameter was refined earlier, and leave out those that have these values now."""
    record = {**before, **originals(model)}
    own = dict(model.named_parameters())
    vars(model)[_ATTRIBUTE] = {
        name: value for name, value in record.items() if name in own and not torch.equal(own[name].detach(), value)
    }


def forget_vectors(model: nn.Module) -> None:
    """Remove the record."""
    vars(model).pop(_ATTRIBUTE, None)


def put_vectors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give parameters the values."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].detach().copy_(value)
