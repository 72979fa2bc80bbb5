"""The tensors of a checkpoint that another program has quantized, by the names that a checkpoint of floats has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isqtorch.files.tensors import DTYPES, Stored, TensorStore
from isqtorch.formats import QuantFormat
from isqtorch.formats.stored import Header, StoredFiles, StoredWeight, method_of
from isqtorch.formats.stored.base import Parts


class QuantizedFiles:
    """Decodes the weights of a checkpoint, one matrix at a time.

    Attributes:
        method: name of the method, for messages.
        weights: {name in a checkpoint of floats: the weight}.
        hidden: names of the tensors in the files that a checkpoint of floats does not have.

    Raises:
        ValueError: a weight is not complete, or a tensor has a wrong type or shape.
        NotImplementedError: the method is not read here.
    """

    def __init__(self, store: TensorStore, entry: Mapping[str, Any]) -> None:
        method = method_of(entry)
        headers = {}
        for name, tensor in store.tensors.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{tensor.file}: tensor {name} has the unknown type {tensor.dtype}")
            headers[name] = Header(DTYPES[tensor.dtype], tensor.shape)
        self._store = store
        self.files = StoredFiles(headers, self._read, store.metadata)
        self.method = method.name
        try:
            self.weights, self.hidden = method.find(self.files)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{next(iter(store.tensors.values())).file.parent}: {error}") from None
        self._done: Callable[[Tensor], None] = lambda tensor: None

    def dropping(self, done: Callable[[Tensor], None]) -> None:
        """Call `done` with each tensor that was read and is no longer needed. All files are mapped from here on."""
        self._done = done
        self._store.open()

    def tensors(self) -> dict[str, Stored]:
        """{name in a checkpoint of floats: the tensor}. That of a quantized weight has the name of the method as type."""
        plain = {name: tensor for name, tensor in self._store.tensors.items() if name not in self.hidden}
        decoded = {}
        for name, weight in self.weights.items():
            decoded[name] = Stored(self._file_of(weight), self.method, weight.shape)
        return plain | decoded

    def matrix(self, weight: StoredWeight, expert: int | None = None) -> Tensor:
        """The float32 values of a weight, or of one of its experts: `[N, K]`."""
        return self._computed(weight, expert, weight.decode)

    def tensor(self, weight: StoredWeight) -> Tensor:
        """The float32 values of a whole weight: `[N, K]` or `[E, N, K]`."""
        if len(weight.shape) == 2:
            return self.matrix(weight)
        out = torch.empty(weight.shape, dtype=torch.float32)
        for expert in range(weight.shape[0]):
            out[expert] = self.matrix(weight, expert)
        return out

    def blocks(self, weight: StoredWeight, fmt: QuantFormat) -> Tensor:
        """The weight as blocks of a format that holds it exactly: uint8 `[N, row_bytes]` or `[E, N, row_bytes]`."""
        *rows, columns = weight.shape
        if len(rows) == 1:
            return self._computed(weight, None, lambda parts: weight.blocks(parts, fmt))
        out = torch.empty(*rows, fmt.row_bytes(columns), dtype=torch.uint8)
        for expert in range(rows[0]):
            out[expert] = self._computed(weight, expert, lambda parts: weight.blocks(parts, fmt))
        return out

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._store.release()

    def _computed(self, weight: StoredWeight, expert: int | None, compute: Callable[[Parts], Tensor]) -> Tensor:
        """What `compute` makes of the tensors of one matrix."""
        parts = weight.matrix(self.files, expert)
        try:
            return compute(parts)
        except ValueError as error:
            raise ValueError(f"{self._file_of(weight)}: {error}") from None
        finally:
            for part in parts.values():
                self._done(part)

    def _file_of(self, weight: StoredWeight) -> Path:
        return self._store.tensors[next(iter(weight.parts.values()))].file

    def _read(self, name: str, expert: int | None = None) -> Tensor:
        return self._store.read(name)[... if expert is None else expert]
