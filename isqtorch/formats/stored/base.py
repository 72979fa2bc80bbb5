"""Weights in checkpoints that other programs have quantized: which tensors belong to one weight, and what they mean.

Such a checkpoint stores a weight in several tensors: codes, scales, perhaps zero points. `StoredMethod` is one way to
do this, configured by the `quantization_config` of a checkpoint. It finds the weights by the names of the tensors. A
`StoredWeight` is one of them. It decodes itself to float32, and it says whether blocks of one of our formats can hold
it without any rounding. Nothing here needs the package that has written the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from isqtorch.formats.base import QuantFormat

Parts = Mapping[str, Tensor]
"""The tensors of one weight, by their role: {"codes": ..., "scale": ...}."""


class Header(NamedTuple):
    """Type and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Kept(NamedTuple):
    """The formats whose blocks hold a weight exactly.

    Attributes:
        formats: the formats, that with the fewest bits first.
        why: the reason, if there are none.
    """

    formats: tuple[QuantFormat, ...]
    why: str = ""


@dataclass(frozen=True)
class StoredFiles:
    """The tensors of a checkpoint, whose values are read when they are needed.

    Attributes:
        headers: {name of a tensor: its type and shape}.
        read: reads a tensor, or the part of it that belongs to one expert.
        metadata: the metadata of the files.
    """

    headers: Mapping[str, Header]
    read: Callable[[str, int | None], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredWeight(ABC):
    """One weight of a checkpoint.

    Attributes:
        name: the name that it has in a checkpoint of floats.
        shape: `[N, K]`, or `[E, N, K]` for a stack of experts; N are the output features.
        parts: {role: name of the tensor}.
        what: the method with its parameters, for messages.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    what: str

    oriented: ClassVar[bool] = True
    """Whether `shape` has the output features first, also for a layer that stores its own weight as `[.., K, N]`. If
    not, `shape` is the layout of that weight."""

    bits: ClassVar[int] = 4
    """Bits of a code. They choose the format for weights that no format can hold exactly."""

    @abstractmethod
    def decode(self, parts: Parts) -> Tensor:
        """The weights of one matrix: f32 `[N, K]`.

        Args:
            parts: the tensors. Those of a stack are without the dimension of the experts.

        Raises:
            ValueError: the values cannot be of this method.
        """

    def kept(self, files: StoredFiles) -> Kept:
        """The formats that hold the weight exactly. May read small tensors, not the codes."""
        return Kept((), f"no format here has the codes of {self.what}")

    def blocks(self, parts: Parts, fmt: QuantFormat) -> Tensor:
        """The weight as blocks of `fmt`, which `kept` has named: uint8 `[N, row_bytes]`. Nothing is rounded."""
        raise AssertionError(f"{self.what} is never kept as {fmt.name}")

    def matrix(self, files: StoredFiles, expert: int | None = None, roles: Sequence[str] | None = None) -> Parts:
        """Read the tensors of one matrix. Only those that have a dimension of experts are cut.

        Args:
            files: the checkpoint.
            expert: number of the matrix in a stack.
            roles: the tensors to read; None: all.
        """
        found = {}
        for role in self.parts if roles is None else roles:
            name = self.parts[role]
            shape = files.headers[name].shape
            cut = expert is not None and bool(shape) and shape[0] == self.shape[0]
            found[role] = files.read(name, expert if cut else None)
        return found


class StoredMethod(ABC):
    """One way to store quantized weights.

    Attributes:
        name: the method as in `quant_method`, for messages.
    """

    name: str

    @abstractmethod
    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        """The weight whose codes are in the tensor `name`; None if that holds no codes.

        Raises:
            ValueError: a tensor that belongs to it is missing, or has a wrong type or shape.
            NotImplementedError: the weight is stored in a way that is not read here.
        """

    def is_extra(self, name: str) -> bool:
        """Whether a tensor serves only to run the method, such as the scale of activations."""
        return False

    def find(self, files: StoredFiles) -> tuple[dict[str, StoredWeight], set[str]]:
        """The weights by their names in a checkpoint of floats, and the names of all tensors that they replace.

        Raises:
            ValueError, NotImplementedError: see `weight`; or a tensor of floats has the name of a weight.
        """
        weights: dict[str, StoredWeight] = {}
        used: set[str] = set()
        for name in files.headers:
            found = self.weight(name, files)
            if found is not None:
                weights[found.name] = found
                used.update(found.parts.values())
        extra = {name for name in files.headers if name not in used and self.is_extra(name)}
        for name in weights:
            if name in files.headers and name not in used | extra:
                raise ValueError(f"{name} is in the checkpoint twice: as floats, and quantized by {self.name}")
        return weights, used | extra


def companion(files: StoredFiles, name: str, candidates: tuple[str, ...], method: str) -> str:
    """The first candidate that the checkpoint has. ValueError if it has none."""
    found = next((each for each in candidates if each in files.headers), None)
    if found is None:
        raise ValueError(
            f"{name} is quantized by {method}, and the checkpoint has no {candidates[0]}. It is damaged, or not complete."
        )
    return found


def check_type(files: StoredFiles, name: str, *types: torch.dtype) -> None:
    """ValueError unless a tensor has one of the types."""
    dtype = files.headers[name].dtype
    if dtype not in types:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in types)
        raise ValueError(f"{name} is {str(dtype).removeprefix('torch.')}, must be {wanted}. The checkpoint is damaged.")


def check_shape(files: StoredFiles, name: str, *shapes: tuple[int, ...]) -> None:
    """ValueError unless a tensor has one of the shapes."""
    shape = files.headers[name].shape
    if shape not in shapes:
        wanted = " or ".join(str(list(each)) for each in shapes)
        raise ValueError(f"{name} is {list(shape)}, must be {wanted}. The checkpoint is damaged.")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
