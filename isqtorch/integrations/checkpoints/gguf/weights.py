"""The weights of a GGUF file for a model: blocks as they are in the file, in the model's order of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isqtorch.files.gguf_model import GgufModel, StoredTensor
from isqtorch.formats import QuantFormat, get_format
from isqtorch.inplace.source import sampled
from isqtorch.integrations.checkpoints.incoming import Held, Incoming
from isqtorch.modules import PackedModule
from isqtorch.modules.convert import float_shape, layer_kind, matrices, upright

from . import types
from .layout import Place, of_blocks
from .record import Architecture


@dataclass(frozen=True)
class _Found:
    """One parameter of the model, in the file."""

    place: Place
    tensors: tuple[StoredTensor, ...]

    @property
    def types(self) -> set[int]:
        return {tensor.type for tensor in self.tensors}


class GgufWeights(Incoming):
    """The weights of a GGUF file, by the names of a model's parameters and saved buffers.

    Args:
        file: the opened file.
        record: its architecture.
        model: a model that was made of the file's configuration.
        notes: for the report, about the whole file.
    """

    def __init__(self, file: GgufModel, record: Architecture, model: nn.Module, notes: Sequence[str] = ()) -> None:
        self.notes = tuple(notes)
        self.where, self.files = file.where, file.files
        self._file, self._record = file, record
        self._config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self._model = model
        self._found: dict[str, _Found | None] = {}

    # ---- what there is -------------------------------------------------------------------------------------------

    def held(self, name: str) -> Held | None:
        found = self._find(name)
        if found is None:
            return None
        names = sorted({types.type_name(number) for number in found.types})
        if all(types.is_plain(number) for number in found.types):
            return Held()
        columns = found.tensors[0].shape[-1]
        quantized = [number for number in found.types if not types.is_plain(number)]
        options = [types.format_of(number) or types.instead_of(number, columns) for number in quantized]
        best = max(options, key=lambda fmt: fmt.bits_per_weight)
        if len(quantized) < len(found.types):
            best = get_format("q8_0")
        if found.place.build is not None:
            return Held(None, best, f"{' and '.join(names)} in the file in parts, one of which is transposed")
        if len(found.types) > 1:
            return Held(None, best, f"its parts are {' and '.join(names)} in the file, and one weight has one format")
        if types.format_of(next(iter(found.types))) is None:
            return Held(None, best, f"{names[0]} in the file, which is no format here")
        if found.place.changes or (found.place.columns is not None and _blocks_of(found, best) is None):
            return Held(
                None,
                best,
                f"{names[0]} in the file with its columns in another order, which cuts blocks of {best.block}",
            )
        return Held(best)

    def unused(self, names: Iterable[str]) -> list[str]:
        found = (self._find(name) for name in names)
        used = {tensor.name for each in found if each is not None for tensor in each.tensors}
        used |= {scale.name for scale in map(self._scale, map(self._file.tensors.get, used)) if scale is not None}
        ignored = re.compile(self._record.ignored)
        return sorted(name for name in self._file.tensors if name not in used and not ignored.fullmatch(name))

    def _find(self, name: str) -> _Found | None:
        if name not in self._found:
            here = self._file.tensors
            places = self._record.places(name, self._config)
            whole = (place for place in places if all(tensor in here for tensor in place.tensors))
            place = next(whole, None)
            self._found[name] = _Found(place, tuple(here[each] for each in place.tensors)) if place else None
        return self._found[name]

    # ---- values --------------------------------------------------------------------------------------------------

    def blocks(self, name: str) -> Tensor:
        found = self._find(name)
        assert found is not None, "held() said that the file has it"
        packed = self._joined(found, [torch.from_numpy(self._file.read(tensor)) for tensor in found.tensors])
        fmt = types.format_of(found.tensors[0].type)
        assert fmt is not None, "held() said that the file has blocks"
        order = None if found.place.columns is None else _blocks_of(found, fmt)
        if order is not None:
            packed = packed.unflatten(-1, (len(order), -1)).index_select(-2, order).flatten(-2)
        return packed

    def read(self, name: str) -> Tensor | None:
        found = self._find(name)
        if found is None:
            return None
        parts = [self._values(tensor) for tensor in found.tensors]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        value = self._joined(found, parts)
        if found.place.columns is not None:
            value = value.index_select(-1, found.place.columns(value.shape[-1]))
        for change in reversed(found.place.changes):
            value = change.to_model(value.float())
        return self._shaped(name, value)

    def _values(self, tensor: StoredTensor) -> Tensor:
        """The decoded rows of a tensor, `[rows of all matrices, columns]`."""
        value = types.decoded(self._file.read(tensor), tensor.type, f"{self.where}: {tensor.name}")
        scale = self._scale(tensor)
        if scale is None:
            return value
        factors = types.decoded(self._file.read(scale), scale.type, f"{self.where}: {scale.name}").float().reshape(-1)
        if len(factors) not in (1, tensor.shape[0]) or (len(factors) > 1 and len(tensor.shape) < 3):
            raise ValueError(
                f"load: {self.where}: {scale.name} has {len(factors)} numbers, must be one for each matrix of {tensor.name}. The file "
                "is damaged."
            )
        return value * factors.repeat_interleave(tensor.rows // len(factors)).unsqueeze(1)

    def _scale(self, tensor: StoredTensor | None) -> StoredTensor | None:
        """The tensor with the second scale of an NVFP4 tensor: one number for each matrix."""
        if tensor is None or types.type_name(tensor.type) != "NVFP4":
            return None
        scale = self._file.tensors.get(tensor.name.removesuffix("weight") + "scale")
        parameters = {name for names in self._record.names for place in names.tensors for name in place}
        if scale is not None and re.sub(r"\d+", "{}", scale.name, count=1) in parameters:
            raise ValueError(
                f"load: {self.where}: {scale.name} is both a scale of {tensor.name}, which is NVFP4, and a parameter of the model. Files "
                "that mix the two cannot be opened; give one with another type."
            )
        return scale

    def _joined(self, found: _Found, parts: list[Tensor]) -> Tensor:
        """The rows of all tensors of a parameter, in the model's order.

        Args:
            found: the parameter.
            parts: for each tensor `[rows of all matrices, columns or bytes]`.
        """
        shaped = []
        for tensor, part in zip(found.tensors, parts, strict=True):
            value = part.reshape(*tensor.shape[:-1], -1)
            shaped.append(value if found.place.part is None else self._part(found, value, tensor))
        if found.place.build is not None:
            try:
                return found.place.build(shaped).contiguous()
            except RuntimeError:
                raise self._error(found, "do not fit together") from None
        axis = found.place.row_axis(shaped[0].dim())
        if any(part.dim() != shaped[0].dim() for part in shaped):
            raise self._error(found, "have different numbers of dimensions")
        if len(shaped) > 1:
            try:
                value = torch.cat(shaped, dim=axis)
            except RuntimeError:
                raise self._error(found, "do not fit together") from None
        else:
            value = shaped[0]
        if found.place.rows is not None:
            try:
                rows = found.place.rows(value.shape[axis])
                value = _moved(value, axis, rows)
            except (RuntimeError, IndexError):
                raise self._error(found, "have a number of rows that the numbers of heads do not divide") from None
        return value.contiguous()

    def _part(self, found: _Found, value: Tensor, tensor: StoredTensor) -> Tensor:
        number = found.place.part
        assert number is not None
        if value.dim() < 2 or number >= value.shape[0]:
            raise self._error(found, f"have no part {number}")
        return value[number]

    def _shaped(self, name: str, value: Tensor) -> Tensor:
        """The value in the layout of the model's parameter: transposed where the layer stores it so, with its dims of 1."""
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        stored = module._parameters.get(leaf, module._buffers.get(leaf))
        if isinstance(module, PackedModule) and leaf in module.packed:
            shape: tuple[int, ...] = float_shape(module, leaf)
        else:
            shape = tuple(stored.shape) if stored is not None else tuple(value.shape)
        if value.dim() > 1 and leaf in matrices(module) and _is_turned(module):
            value = value.transpose(-1, -2)
        if value.shape != shape and [n for n in value.shape if n != 1] == [n for n in shape if n != 1]:
            value = value.reshape(shape)
        return value

    def sample(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        found = self._find(name)
        chosen = sampled(shape)
        if found is None:
            return None
        if chosen is ...:
            value = self.read(name)
            return None if value is None or tuple(value.shape) != shape else value
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        place, tensor = found.place, found.tensors[0]
        if len(found.tensors) > 1 or place.columns or place.changes or place.part is not None or self._scale(tensor):
            return None
        if (leaf in matrices(module) and _is_turned(module)) or tensor.shape != shape:
            return None
        order = found.place.rows(shape[-2]) if found.place.rows else None
        *stack, rows = (np.asarray(index) for index in chosen)
        rows = rows if order is None else np.asarray(order)[rows]
        numbers = np.ravel_multi_index((*stack, rows), shape[:-1])
        read = [self._file.read(tensor, slice(int(number), int(number) + 1)) for number in numbers]
        return torch.stack(
            [types.decoded(row, tensor.type, f"{self.where}: {tensor.name}").reshape(-1) for row in read]
        )

    def release(self) -> None:
        self._file.release()

    def _error(self, found: _Found, message: str) -> ValueError:
        names = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in found.tensors)
        return ValueError(f"load: {self.where}: {names} {message}. The file is damaged.")


def _blocks_of(found: _Found, fmt: QuantFormat) -> Tensor | None:
    """For each block of a row of the model, its number in the file; None if the order of columns cuts blocks."""
    assert found.place.columns is not None
    return of_blocks(found.place.columns(found.tensors[0].shape[-1]), fmt.block)


def _moved(value: Tensor, axis: int, rows: Tensor) -> Tensor:
    """The rows of a tensor in another order. numpy moves whole rows of bytes, which torch does byte by byte."""
    if axis == value.dim() - 1:
        return value.index_select(axis, rows)
    data = value.contiguous().view(torch.uint8).numpy()
    return torch.from_numpy(np.take(data, rows.numpy(), axis=axis)).view(value.dtype)


def _is_turned(module: Any) -> bool:
    """Whether a layer stores its weights as `[K, N]`."""
    if isinstance(module, PackedModule):
        return bool(module.is_turned())
    if layer_kind(module) is None:
        return False
    return (
        tuple(upright(module, torch.empty(1, 2, 3, device="meta")).shape) == (1, 3, 2)
        if layer_kind(module) == "experts"
        else (layer_kind(module) == "conv1d")
    )
