"""Who wants to know when the layers of a model have changed: integrations that keep a record of them on the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from isqtorch.report.report import QuantReport

Listener = Callable[[nn.Module, "QuantReport | None"], None]

_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Call `listener(model, report)` after every change; the report is None where there is none."""
    _listeners.append(listener)


def announce(model: nn.Module, report: QuantReport | None) -> None:
    """Tell everybody; what one of them raises comes through."""
    for listener in _listeners:
        listener(model, report)
