"""The Host for diffusers: finds the files of a model. Their names are those of its parameters, so any reader reads them.

A model knows the folder or id that it was loaded from, but not the subfolder, such as "transformer" in the folder of a
pipeline. The subfolder is that whose config.json names the class of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from isqtorch.files.checkpoints import checkpoint_files, read_json
from isqtorch.inplace.source import Source
from isqtorch.integrations.hub import cached_snapshot
from isqtorch.report.report import QuantReport


class DiffusersHost:
    """See `isqtorch.inplace.host.Host`."""

    def files(self, model: nn.Module) -> list[str] | None:
        if not isinstance(model, ModelMixin):
            return None
        name = str(model.config.get("_name_or_path") or "")
        try:
            folder = _folder(name, type(model).__name__) if name else None
            return None if folder is None else [str(path) for path in checkpoint_files(folder, name)]
        except (OSError, ValueError):  # of a folder that has changed since
            return None

    def open(self, model: nn.Module, files: Sequence[str], remembered: bool) -> Source | None:
        return None  # the names in the files are those of the model

    def changed(self, model: nn.Module, report: QuantReport | None) -> None:
        """Nothing: diffusers keeps no record of layers."""


def _folder(name: str, cls: str) -> Path | None:
    """The folder with the weights of a model of this class; None if there is not exactly one."""
    found = Path(name) if Path(name).is_dir() else cached_snapshot(name)
    if found is None:
        return None
    folders = [found] if _is_of(found, cls) else [path for path in sorted(found.iterdir()) if _is_of(path, cls)]
    return folders[0] if len(folders) == 1 else None


def _is_of(folder: Path, cls: str) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == cls
