"""The tensors of a checkpoint in safetensors files, read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .binary import regular
from .checkpoints import complete

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name of a type in safetensors -> the type."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    file: Path
    dtype: str  # name of the type in safetensors
    shape: tuple[int, ...]


class TensorStore:
    """All tensors of some safetensors files. Only the headers are read before a tensor is asked for.

    Attributes:
        tensors: {name in the files: the tensor there}.
        metadata: the metadata of all files, joined.

    Raises:
        ValueError: a file is damaged, or a tensor is in two files.
        OSError: a file is missing or cannot be read.
    """

    def __init__(self, files: Sequence[Path], hint: str = "") -> None:
        """Read the headers.

        Args:
            files: the files.
            hint: what to do if one is missing, for the message.
        """
        self._hint = hint
        self._open: dict[Path, Any] = {}
        self._seen: dict[Path, tuple[int, int, int]] = {}  # detects that a file was replaced
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        for path in files:
            file = self._file(path)
            self.metadata |= file.metadata() or {}
            for name in file.keys():
                piece = file.get_slice(name)
                if name in self.tensors:
                    raise ValueError(f"{path}: tensor {name} is in another file of the checkpoint too")
                self.tensors[name] = Stored(path, str(piece.get_dtype()), tuple(piece.get_shape()))
        self.release()

    def read(self, name: str) -> Tensor:
        """A tensor, which is a view of the mapped file: pages are read when they are used. Do not write to it."""
        stored = self.tensors[name]
        with complete(stored.file):
            tensor: Tensor = self._file(stored.file).get_tensor(name)
        return tensor

    def release(self) -> None:
        """Close the files, so that pages that were read do not stay in memory. They are opened again when needed."""
        self._open.clear()

    def open(self) -> None:
        """Open all files now. Until they are released, nothing is opened again, and each has one mapping."""
        for path in self._seen:
            self._file(path)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file{self._hint and f'. {self._hint}.'}")
            regular(path)
            state = path.stat()
            mark = state.st_ino, state.st_size, state.st_mtime_ns
            if self._seen.setdefault(path, mark) != mark:
                raise ValueError(f"{path}: was replaced or written to while it was read. Nothing was changed.")
            with complete(path):
                self._open[path] = safe_open(path, framework="pt")
        return self._open[path]
