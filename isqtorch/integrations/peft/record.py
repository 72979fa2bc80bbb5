"""Record: what a packed layer that holds merged adapters was before. It is an attribute of the layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from isqtorch.modules import PackedModule

_ATTRIBUTE = "_isq_merged"


@dataclass(eq=False)
class Record:
    """The layer before the merge, and what was merged.

    Attributes:
        original: the packed layer without adapters.
        merged: [(layer of PEFT, names of its adapters)], in the order in which they were merged.
    """

    original: PackedModule
    merged: list[tuple[Any, list[str]]] = field(default_factory=list)


def record_of(layer: nn.Module) -> Record | None:
    """The record of a layer, or None if no adapter is merged into it."""
    return cast("Record | None", vars(layer).get(_ATTRIBUTE))


def attach(layer: nn.Module, record: Record) -> None:
    """Remember `record` in a layer."""
    vars(layer)[_ATTRIBUTE] = record


def detach(layer: nn.Module) -> None:
    """Forget what a layer was: its adapters stay merged for good."""
    vars(layer).pop(_ATTRIBUTE, None)


def unmerged(layer: PackedModule) -> PackedModule:
    """The layer as it was before any adapter was merged."""
    record = record_of(layer)
    return layer if record is None else record.original
