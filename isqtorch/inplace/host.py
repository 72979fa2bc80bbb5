"""Host: the interface to a library that loads models, such as transformers.

A host knows from which files a model was loaded, and updates the library's own record of a model. This room imports no
such library; `isqtorch.integrations` registers the hosts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from isqtorch.modules.parameter import name_packed
from isqtorch.report.report import QuantReport

from .source import Source, TensorFiles


class Host(Protocol):
    """A library with its own loader. Each method ignores models of other libraries."""

    def files(self, model: nn.Module) -> list[str] | None:
        """The files that `model` was loaded from, or None if not known. Never uses the network, never raises."""

    def open(self, model: nn.Module, files: Sequence[str], remembered: bool) -> Source | None:
        """The source that converts tensors as the library's loader does, or None for a model of another library.

        `remembered` is True if the model is known to be loaded from these files, and False if the user named them.
        """

    def changed(self, model: nn.Module, report: QuantReport | None) -> None:
        """Called after the layers of `model` have changed; the report may be None. Exceptions propagate."""


_hosts: list[Host] = []


def register_host(host: Host) -> None:
    """Add a host."""
    _hosts.append(host)


def files_of(model: nn.Module) -> tuple[str, ...]:
    """Absolute paths of the files that a model was loaded from; empty if not known."""
    found = next(filter(None, (host.files(model) for host in _hosts)), [])
    return tuple(os.path.abspath(file) for file in found)


def open_source(model: nn.Module, files: Sequence[str], remembered: bool = True) -> Source:
    """The checkpoint in `files`, converted as for `model` when it was loaded. Errors are those of Source."""
    opened = (host.open(model, files, remembered) for host in _hosts)
    return next((source for source in opened if source is not None), None) or TensorFiles(files)


def announce(model: nn.Module, report: QuantReport | None) -> None:
    """Tell the weights their names, and call all hosts, after the layers of a model have changed. Exceptions propagate."""
    name_packed(model)
    for host in _hosts:
        host.changed(model, report)
