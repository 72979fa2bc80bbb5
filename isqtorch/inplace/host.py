"""Host: what a library that loads models contributes, so that files are found again and its own record of a model stays true.

Nothing in this room knows such a library; `isqtorch.integrations` registers them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from isqtorch.modules.parameter import name_packed
from isqtorch.report.report import QuantReport

from .source import Source


class Host(Protocol):
    """A library with a loader of its own. Each method ignores models that are not the library's."""

    def files(self, model: nn.Module) -> list[str] | None:
        """The files that `model` was loaded from, None if that is not known. No network, and no error."""

    def open(self, model: nn.Module, files: Sequence[str], remembered: bool) -> Source | None:
        """The source that converts as the loader does, None for a model that is not the library's.

        `remembered` says that the model was loaded from these files, and not only that the user says so.
        """

    def changed(self, model: nn.Module, report: QuantReport | None) -> None:
        """The layers of `model` have changed; the report is None where there is none. Errors reach the caller."""


_hosts: list[Host] = []


def register(host: Host) -> None:
    """Ask this host, too, from now on."""
    _hosts.append(host)


def files_of(model: nn.Module) -> tuple[str, ...]:
    """Absolute paths of the files that a model was loaded from; empty if they are not known."""
    found = next(filter(None, (host.files(model) for host in _hosts)), [])
    return tuple(os.path.abspath(file) for file in found)


def open_source(model: nn.Module, files: Sequence[str], remembered: bool = True) -> Source:
    """The checkpoint in `files`, read as `model` was; errors as those of Source."""
    opened = (host.open(model, files, remembered) for host in _hosts)
    return next((source for source in opened if source is not None), None) or Source(files)


def announce(model: nn.Module, report: QuantReport | None) -> None:
    """Tell all hosts, and the weights themselves, that the layers of a model have changed."""
    name_packed(model)
    for host in _hosts:
        host.changed(model, report)
