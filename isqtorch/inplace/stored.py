"""The tensors of a checkpoint that another program has quantized, by the names that a checkpoint of floats has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from isqtorch.files.tensors import Stored, TensorStore
from isqtorch.formats import QuantFormat
from isqtorch.formats.stored import Header, StoredFiles, StoredWeight, method_of
from isqtorch.formats.stored.base import Parts

_TYPES = {
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
            if tensor.dtype not in _TYPES:
                raise ValueError(f"{tensor.file}: tensor {name} has the unknown type {tensor.dtype}")
            headers[name] = Header(_TYPES[tensor.dtype], tensor.shape)
        self._store = store
        self.files = StoredFiles(headers, self._read, store.metadata)
        self.method = method.name
        self.weights, self.hidden = method.find(self.files)
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
            file = self._store.tensors[next(iter(weight.parts.values()))].file
            decoded[name] = Stored(file, self.method, weight.shape)
        return plain | decoded

    def matrix(self, weight: StoredWeight, expert: int | None = None) -> Tensor:
        """The float32 values of a weight, or of one of its experts: `[N, K]`."""
        parts = weight.matrix(self.files, expert)
        try:
            return weight.decode(parts)
        finally:
            self._drop(parts)

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
            return self._blocks(weight, fmt, None)
        out = torch.empty(*rows, fmt.row_bytes(columns), dtype=torch.uint8)
        for expert in range(rows[0]):
            out[expert] = self._blocks(weight, fmt, expert)
        return out

    def _blocks(self, weight: StoredWeight, fmt: QuantFormat, expert: int | None) -> Tensor:
        parts = weight.matrix(self.files, expert)
        try:
            return weight.blocks(parts, fmt)
        finally:
            self._drop(parts)

    def _drop(self, parts: Parts) -> None:
        for part in parts.values():
            self._done(part)

    def _read(self, name: str, expert: int | None = None) -> Tensor:
        return self._store.read(name)[... if expert is None else expert]
