"""A writer of safetensors files that holds one weight in memory at a time, with an index for files in shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 5_000_000_000  # as mlx-lm and transformers; one weight may be larger
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Member:
    """One tensor of a file, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together, and follow each other in the file.

    Attributes:
        members: the tensors. The size of all of them must be a multiple of the size of their largest element, and the
            larger elements must come first: readers need elements at multiples of their size.
        read: makes the values, in the order of `members`.
    """

    members: tuple[Member, ...]
    read: Callable[[], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(member.nbytes for member in self.members)


def write_shards(folder: Path, pieces: Iterable[Piece], metadata: Mapping[str, str]) -> int:
    """Write model.safetensors, or shards with an index if there are more than SHARD_BYTES.

    Args:
        folder: the folder.
        pieces: the tensors.
        metadata: of all files.

    Returns:
        The bytes of all tensors.

    Raises:
        ValueError: a tensor is of a type that safetensors files do not have, or two have the same name.
        OSError: a file cannot be written.
    """
    pieces = list(pieces)
    names = [member.name for piece in pieces for member in piece.members]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{twice[0]} would be twice in {folder}")
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / file, shard, metadata)
        places |= {member.name: file for piece in shard for member in piece.members}
    size = sum(piece.nbytes for piece in pieces)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return size


def _write(path: Path, pieces: Iterable[Piece], metadata: Mapping[str, str]) -> None:
    """Write one file."""
    # Each piece begins at a multiple of the power of two that divides its own size, because those before are multiples.
    pieces = sorted(pieces, key=lambda piece: -math.gcd(piece.nbytes, 8))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for piece in pieces:
        for member in piece.members:
            if member.dtype not in _NAMES:
                raise ValueError(f"{member.name} is {member.dtype}, which safetensors files do not have")
            assert end % member.dtype.itemsize == 0, f"{member.name} would not be aligned"
            place = [end, end + member.nbytes]
            header[member.name] = {"dtype": _NAMES[member.dtype], "shape": list(member.shape), "data_offsets": place}
            end += member.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for piece in pieces:
            for member, tensor in zip(piece.members, piece.read(), strict=True):
                assert tensor.dtype == member.dtype and tuple(tensor.shape) == member.shape, member.name
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
