"""The checkpoint of a model: reads its tensors one by one, by the names of the model's parameters.

The checkpoint of a plain module has the names of the state dict. A library whose loader renames, joins or transposes
tensors has its own subclass of Source (see `host.py`), which does the same to the tensors read here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from isqtorch.files.checkpoints import checkpoint_files, complete, read_json

_FLOATS = ("F64", "F32", "F16", "BF16")
_ELSE = "Give source=..., the original model's folder or .safetensors file, or source='stored' to start from the quantized weights"


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    file: Path
    dtype: str  # name of the type in safetensors
    shape: tuple[int, ...]


class Source:
    """The float tensors of some safetensors files.

    Attributes:
        where: the folder or file, for messages.
        tensors: {name in the files: the tensor there}.

    Raises:
        ValueError: a file is damaged, a tensor is in two files, or the files hold packed weights.
        OSError: a file is missing or cannot be read.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        paths = [Path(file) for file in files]
        self.where = str(paths[0].parent if len(paths) > 1 or paths[0].name == "model.safetensors" else paths[0])
        self.tensors: dict[str, Stored] = {}
        self._open: dict[Path, Any] = {}
        self._seen: dict[Path, tuple[int, int, int]] = {}  # detects that a file was replaced
        method = _quantized_by(paths[0].parent)
        for path in paths:
            file = self._file(path)
            if "isqtorch" in (file.metadata() or {}):
                method = "isqtorch"
            for name in file.keys():
                piece = file.get_slice(name)
                if name in self.tensors:
                    raise ValueError(f"{path}: tensor {name} is in another file of the checkpoint too")
                self.tensors[name] = Stored(path, str(piece.get_dtype()), tuple(piece.get_shape()))
        if method is not None:
            raise ValueError(f"{self.where}: is quantized by {method} itself. {_ELSE}.")
        self.release()

    def read(self, name: str) -> Tensor | None:
        """A parameter as it was loaded, in the type of the checkpoint, on the CPU; None if it is not there.

        The result may be a view of the mapped file: do not write to it.

        Raises:
            ValueError: the tensor is not of a float type, or the file was changed after it was opened.
        """
        return self.tensor(name) if name in self.tensors else None

    def first_row(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The first row of a matrix, or a whole vector; None if its shape differs or a conversion makes it."""
        key = self._plain(name)
        return self.tensor(key, row=True) if key is not None and self.tensors[key].shape == shape else None

    def _plain(self, name: str) -> str | None:
        """Name of the tensor that is loaded as this parameter without any conversion, or None."""
        return name if name in self.tensors else None

    def tensor(self, key: str, row: bool = False) -> Tensor:
        """A tensor, or its first row, by its name in the files."""
        stored = self.tensors[key]
        if stored.dtype not in _FLOATS:
            raise ValueError(f"{stored.file}: {key} is {stored.dtype}, must be one of {', '.join(_FLOATS)}. {_ELSE}.")
        with complete(stored.file):
            piece = self._file(stored.file).get_slice(key)
            tensor: Tensor = piece[:1] if row and len(stored.shape) > 1 else piece[...]
        return tensor

    def release(self) -> None:
        """Close the files, so that pages that were read do not stay in memory. They are opened again when needed."""
        self._open.clear()

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file. {_ELSE}.")
            state = path.stat()
            mark = state.st_ino, state.st_size, state.st_mtime_ns
            if self._seen.setdefault(path, mark) != mark:
                raise ValueError(f"{path}: was replaced or written to while it was read. Nothing was changed.")
            with complete(path):
                self._open[path] = safe_open(path, framework="pt")
        return self._open[path]


def files_in(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The safetensors files of a folder, or the one file that is given.

    Raises:
        ValueError: the index file of the folder is not valid.
        OSError: the path does not exist, or the folder has no safetensors files.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise FileNotFoundError(f"requantize_: source: no folder or file {str(path)!r}")
    files = checkpoint_files(given, "requantize_: source") if given.is_dir() else [given]
    return tuple(os.path.abspath(file) for file in files)


def difference(model: nn.Module, source: Source) -> str | None:
    """Name of the first float parameter that differs from the checkpoint (trained, merged or replaced since), or None.

    Vectors are compared whole, matrices by their first row, if the checkpoint has them in the same shape. This takes
    seconds for any model, and it is enough to find training and merged adapters, because they change values everywhere.
    """
    shared: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if parameter.is_floating_point() and parameter.device.type != "meta" and type(parameter) is nn.Parameter:
            shared.setdefault(id(parameter), []).append(name)
    try:
        for names in shared.values():
            own = parameters[names[0]].detach()
            rows = (source.first_row(name, tuple(own.shape)) for name in names)
            found = [_same(own[:1] if own.dim() > 1 else own, row) for row in rows if row is not None]
            if found and not any(found):
                return names[0]
    finally:
        source.release()
    return None


def _same(own: Tensor, other: Tensor) -> bool:
    """Whether the values of the checkpoint, cast to the type of the model, equal those of the model bit for bit."""
    bits = [tensor.to("cpu", own.dtype).reshape(-1).contiguous().view(torch.uint8) for tensor in (own, other)]
    return bool(torch.equal(*bits))


def _quantized_by(folder: Path) -> str | None:
    """Quantization method of the checkpoint in a folder according to its config.json, or None."""
    config = folder / "config.json"
    entry = read_json(config).get("quantization_config") if config.is_file() else None
    return str(entry.get("quant_method")) if isinstance(entry, dict) else None
