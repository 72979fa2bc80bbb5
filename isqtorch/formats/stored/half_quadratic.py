"""HQQ as the hqq package stores it: codes in `W_q`, scales and zeros, and every setting in a tensor of its own.

The weight was reshaped before: to rows of one group each (axis 1), or to columns of one group each (axis 0). The packed
tensor has a part of the rows in each run of bits, the first part in the highest bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FLOATS, Kept, Parts, StoredFiles, StoredMethod, StoredWeight, check_shape, check_type, companion
from .integers import IntWeight

_PACKINGS = {"8bit_u8": (8, 8), "4bit_u8": (4, 8), "3bit_32": (3, 30), "2bit_u8": (2, 8), "1bit_u8": (1, 8)}
"""Name: (bits of a code, bits of a word that are used)."""

_SETTINGS = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)


@dataclass(frozen=True)
class HqqWeight(IntWeight):
    """Parts `codes`, `scale` and `zeros`.

    Attributes:
        used: bits of a word that hold codes.
        axis: 1: a group is a run of columns; 0: it is not.
        sizes: rows and columns of the reshaped weight.
    """

    used: int
    axis: int
    sizes: tuple[int, int]

    def codes(self, parts: Parts) -> Tensor:
        words = parts["codes"]
        if words.dtype.is_floating_point:
            words = words.view(torch.int32 if self.used > 8 else torch.uint8)
        mask = (1 << self.width) - 1
        pieces = [words >> shift & mask for shift in range(self.used - self.width, -1, -self.width)]
        return torch.cat(pieces)[: self.sizes[0]].to(torch.uint8).reshape(self.shape)

    def scales(self, parts: Parts) -> tuple[Tensor, Tensor]:
        return parts["scale"].reshape(self.shape[0], -1), parts["zeros"].reshape(self.shape[0], -1)

    def decode(self, parts: Parts) -> Tensor:
        if self.axis == 1 and self.shape[1] % self.group == 0:
            return super().decode(parts)
        out = self.codes(parts).to(torch.float32).view(self.sizes)
        for role in ("zeros", "scale"):
            if not bool(torch.isfinite(parts[role]).all()):
                raise ValueError(f"{self.parts[role]} has values that are not finite. The checkpoint is damaged.")
        out.sub_(parts["zeros"].to(torch.float32)).mul_(parts["scale"].to(torch.float32))
        return out.view(self.shape)

    def kept(self, files: StoredFiles) -> Kept:
        if self.axis == 0:
            return Kept((), "its groups are not runs of columns (axis 0)")
        if self.shape[1] % self.group:
            return Kept((), f"groups of {self.group} weights cross the ends of its rows")
        return super().kept(files)


class Hqq(StoredMethod):
    """A checkpoint of the hqq package."""

    name = "hqq"

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        if not name.endswith(".W_q"):
            return None
        stem = name.removesuffix("W_q")
        parts = {"codes": name}
        for role, leaf in (("scale", "scale"), ("zeros", "zero")):
            parts[role] = companion(files, name, (f"{stem}{leaf}",), self.name)
            check_type(files, parts[role], *FLOATS)
        for setting in ("quant_scale", "quant_zero"):
            if self._number(f"{stem}{setting}", files, 0):
                raise NotImplementedError(f"{name}: HQQ whose scales or zeros are quantized too is not read")
        packing = self._text(companion(files, name, (f"{stem}packing",), self.name), files)
        if packing not in _PACKINGS:
            raise NotImplementedError(
                f"{name}: HQQ in the packing {packing!r} is not read, only {', '.join(_PACKINGS)}"
            )
        width, used = _PACKINGS[packing]
        axis = self._number(f"{stem}axis", files, 1)
        shape = companion(files, name, (f"{stem}shape",), self.name)
        check_shape(files, shape, (2,))
        rows, columns = map(int, files.read(shape, None))
        groups = math.prod(files.headers[parts["scale"]].shape)
        if rows < 1 or columns < 1 or groups < 1 or rows * columns % groups or axis not in (0, 1):
            raise ValueError(
                f"{name}: a weight of {rows} x {columns} in {groups} groups along axis {axis} is impossible. The checkpoint is damaged."
            )
        group = rows * columns // groups
        sizes = (groups, group) if axis == 1 else (group, groups)
        check_shape(files, parts["scale"], (groups, 1) if axis == 1 else (1, groups))
        check_shape(files, parts["zeros"], (groups, 1) if axis == 1 else (1, groups))
        self._check_codes(name, files, -(-sizes[0] // (used // width)), sizes[1], 4 if used > 8 else 1)
        what = f"{self.name} ({width} bits, groups of {group}, axis {axis})"
        return HqqWeight(f"{stem}weight", (rows, columns), parts, what, width, group, used, axis, sizes)

    def is_extra(self, name: str) -> bool:
        return name.rpartition(".")[2] in _SETTINGS

    def _check_codes(self, name: str, files: StoredFiles, rows: int, columns: int, size: int) -> None:
        """ValueError unless the codes have these many words of `size` bytes, perhaps seen as floats."""
        dtype = files.headers[name].dtype
        if dtype.is_floating_point:
            check_shape(files, name, (rows, columns * size // dtype.itemsize))
        else:
            check_type(files, name, torch.int32 if size == 4 else torch.uint8)
            check_shape(files, name, (rows, columns))

    def _number(self, name: str, files: StoredFiles, default: int) -> int:
        if name not in files.headers:
            return default
        if math.prod(files.headers[name].shape) != 1:
            raise ValueError(
                f"{name} is {list(files.headers[name].shape)}, must be one number. The checkpoint is damaged."
            )
        return int(files.read(name, None).reshape(()))

    def _text(self, name: str, files: StoredFiles) -> str:
        shape = files.headers[name].shape
        check_type(files, name, torch.uint8)
        if len(shape) != 1 or shape[0] > 64:
            raise ValueError(f"{name} is {list(shape)}, must be a short text. The checkpoint is damaged.")
        return "".join(map(chr, files.read(name, None).tolist()))
