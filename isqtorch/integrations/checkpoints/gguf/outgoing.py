"""The weights of a model as tensors of a GGUF file: packed bytes unchanged, in the order of rows that the file wants.

Values are read only when a tensor is written, so at most one is copied at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from isqtorch.files.gguf_writing import Entry
from isqtorch.formats import formats, get_format
from isqtorch.formats.gguf_types import GGUF_TYPES, GgufType
from isqtorch.modules.convert import matrices, upright
from isqtorch.modules.packed import PackedModule
from isqtorch.modules.parameter import plain_bytes
from isqtorch.text import first_names

from .layout import Place, Rows, back, of_blocks

_NOT_IN_FILES = ("q8_1", "q8k")  # of activations, inside of ggml; no program reads a file with them
TYPES = {row.format: row for row in GGUF_TYPES.values() if row.format in formats() and row.format not in _NOT_IN_FILES}
"""Format -> type of the file."""
_BY_NAME = {row.name: row for row in GGUF_TYPES.values()}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# llama.cpp reads these as F32 only, or computes with them in no other type.
_SINGLE = re.compile(
    r"(?:\.|^)(?:ffn_gate_inp|ffn_gate_inp_shexp|position_embd|token_types|ssm_\w+|shortconv\.conv)(?:\.weight)?$|\.bias$"
)
_MATRICES = re.compile(r"ssm_(?:in|out|x|dt|alpha|beta|ba)\.weight$")  # not these: ordinary matrices


@dataclass(frozen=True)
class Source:
    """One parameter or saved buffer of the model.

    Attributes:
        name: its name in the state dict.
        module: the layer that holds it.
        leaf: its name there.
        format: the format in which it is packed; None: it is float.
    """

    name: str
    module: nn.Module
    leaf: str
    format: str | None

    @property
    def tensor(self) -> Tensor:
        """The bytes, or the values with output features before input features."""
        stored = getattr(self.module, self.leaf)
        if self.format is not None:
            return plain_bytes(stored)
        return upright(self.module, stored.detach()) if self.leaf in matrices(self.module) else stored.detach()


def sources(model: nn.Module) -> list[Source]:
    """All parameters and saved buffers of a model; a shared one is there once, under its first name."""
    found = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        packed = module.packed if isinstance(module, PackedModule) else {}
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or leaf in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            found.append(Source(f"{path}.{leaf}".lstrip("."), module, leaf, packed.get(leaf)))
    return found


def entries(op: str, found: Sequence[tuple[Source, Place]]) -> list[Entry]:
    """The tensors of the file, in the order of the model.

    Raises:
        ValueError: a weight is packed in a format that GGUF does not have, or in one that cannot follow what the file does to
            columns or values.
    """
    written: dict[str, Entry] = {}
    stacks: dict[str, list[tuple[Source, Place]]] = {}
    for source, place in found:
        _check(op, source, place)
        if place.part is not None:
            (name,) = place.tensors
            written.setdefault(name, Entry(name, (), 0))  # keeps its place in the file
            stacks.setdefault(name, []).append((source, place))
            continue
        for i, name in enumerate(place.tensors):
            if name in written:
                raise ValueError(
                    f"{op}: {source.name} would be a second {name!r} in the file: the model is of another architecture"
                )
            written[name] = _entry(name, [source], _Transform(place, i, _blocks(source, place)))
    for name, parts in stacks.items():
        written[name] = _stack(op, name, parts)
    return list(written.values())


def _check(op: str, source: Source, place: Place) -> None:
    if source.format is None:
        return
    if source.format not in TYPES:
        raise ValueError(
            f"{op}: {source.name} is {source.format}, which GGUF does not have; it has {', '.join(TYPES)}. Pack the model again, from "
            "its float weights: requantize_(model, 'q4k'), or --isq q4k on the command line."
        )
    layer = source.name.removesuffix(".weight")
    if place.changes:
        raise ValueError(
            f"{op}: {source.name} is packed, and in the file its values are others ({place.changes[0].name}). Leave this layer in float: "
            f"quantize_(..., exclude=[{re.escape(layer)!r}])."
        )
    if place.columns is not None and _order_of_blocks(source, place.columns) is None:
        kind = re.escape(re.sub(r"\.\d+\.", ".*.", layer).rpartition(".*.")[2])
        raise ValueError(
            f"{op}: {source.name} is {source.format}, and the file has its columns in an order that cuts the blocks of "
            f"{get_format(source.format).block}. Give these layers blocks of 32 columns, topology={{'/{kind}$/': 'q8_0'}}, or leave them "
            f"in float, exclude=['{kind}$']."
        )


def _order_of_blocks(source: Source, columns: Rows) -> Tensor | None:
    """For each block of a row in the file, its number in the model; None if the order of columns cuts blocks.

    `columns` is the order of single columns: see `Place`.
    """
    assert source.format is not None
    fmt = get_format(source.format)
    return of_blocks(back(columns(fmt.in_features(source.tensor.shape[-1]))), fmt.block)


def _stack(op: str, name: str, parts: list[tuple[Source, Place]]) -> Entry:
    """Parameters that are one tensor of the file."""
    parts = sorted(parts, key=lambda item: item[1].part or 0)
    if [place.part for _, place in parts] != list(range(len(parts))):
        raise ValueError(
            f"{op}: {name} of the file would lack an entry: the model has {first_names([s.name for s, _ in parts])}"
        )
    kinds = {(source.format, source.tensor.dtype) for source, _ in parts}
    if len(kinds) > 1:
        has = first_names(sorted({source.format or str(source.tensor.dtype) for source, _ in parts}))
        raise ValueError(
            f"{op}: {first_names([s.name for s, _ in parts])} are one tensor of the file, and have {has}. Give them one format."
        )
    return _entry(name, [source for source, _ in parts], _Transform(parts[0][1], 0, _blocks(*parts[0])), stacked=True)


def _blocks(source: Source, place: Place) -> Tensor | None:
    return None if source.format is None or place.columns is None else _order_of_blocks(source, place.columns)


@dataclass(frozen=True)
class _Transform:
    """What becomes of a parameter, or of the matrices of a stack, on the way to tensor `number` of its place.

    `blocks` is the order of the blocks of a packed row; None: the parameter is float, or they stay in order.
    """

    place: Place
    number: int
    blocks: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        place, device = self.place, tensor.device
        if self.blocks is not None:
            split = tensor.unflatten(-1, (len(self.blocks), -1))
            tensor = split.index_select(-2, self.blocks.to(device)).flatten(-2)
        elif place.columns is not None:
            tensor = tensor.index_select(-1, back(place.columns(tensor.shape[-1])).to(device))
        for change in place.changes:
            tensor = change.to_file(tensor.float())
        axis = place.row_axis(tensor.dim())
        rows, count = tensor.shape[axis], len(place.tensors)
        size = rows // count
        assert size * count == rows, f"{rows} rows for {place.tensors}"
        if place.rows is not None:
            order = back(place.rows(rows))[self.number * size : (self.number + 1) * size]
            return tensor.index_select(axis, order.to(device))
        return tensor.narrow(axis, self.number * size, size) if count > 1 else tensor


def _entry(name: str, parts: Sequence[Source], transform: _Transform, stacked: bool = False) -> Entry:
    """One tensor of the file, made of one parameter, or of several that it stacks."""
    first = parts[0].tensor
    shape = list(transform(torch.empty(first.shape, dtype=first.dtype, device="meta")).shape)
    if stacked:
        shape.insert(0, len(parts))
    if parts[0].format is None:
        kind = _float_type(name, first.dtype, shape)
        dtype = next(dtype for dtype, float_name in _FLOATS.items() if float_name == kind.name)
    else:
        kind, dtype = TYPES[parts[0].format], torch.uint8
        shape[-1] = shape[-1] // kind.block_bytes * kind.block
    nbytes = prod(shape) // kind.block * kind.block_bytes

    def read() -> Iterator[memoryview]:
        for part in parts:
            # A stack goes matrix by matrix: it can be larger than the memory that is free.
            for piece in (
                part.tensor.split(1) if part.tensor.dim() == 3 and not transform.place.changes else [part.tensor]
            ):
                values = transform(piece).to("cpu", dtype).contiguous()
                yield memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    return Entry(name, tuple(reversed(shape)), nbytes, kind.number, read)


def _float_type(name: str, dtype: torch.dtype, shape: Sequence[int]) -> GgufType:
    """The type of a tensor of floats: as it is, but for vectors and for what llama.cpp wants in F32."""
    single = len(shape) < 2 or (_SINGLE.search(name) and not _MATRICES.search(name))
    return _BY_NAME["F32" if single else _FLOATS.get(dtype, "F32")]
