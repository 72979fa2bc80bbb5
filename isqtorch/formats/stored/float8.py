"""FP8: codes of one byte, and a scale for the tensor, for each row, or for each block of rows and columns.

Blocks start at the first row and column. The last block of a direction may be shorter. Written by DeepSeek, Qwen and
transformers ("fp8"), by FBGEMM, and by compressed-tensors ("float-quantized").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isqtorch.formats.base import QuantFormat, get_format

from .base import FLOATS, Kept, Parts, StoredFiles, StoredMethod, StoredWeight, check_type, companion

_MX = 32  # columns of a block of MXFP8, also beside blocks of another size
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_EXTRA = (
    *("activation_scale", "input_scale", "input_scale_ub", "qscale_act", "k_scale", "v_scale", "q_scale", "kv_scale"),
    *("output_scale", "input_zero_point", "output_zero_point"),
)


@dataclass(frozen=True)
class Fp8Weight(StoredWeight):
    """A weight of FP8 codes; parts `codes` and `scale`.

    Attributes:
        block: rows and columns that share a scale.
        grid: shape of the scales, [rows of blocks, columns of blocks].
    """

    block: tuple[int, int]
    grid: tuple[int, int]
    standard: bool  # whether the codes are of the type that the format fp8 has

    oriented: ClassVar[bool] = False
    bits: ClassVar[int] = 8

    def _scales(self, parts: Parts) -> Tensor:
        scales = as_scales(parts["scale"]).reshape(self.grid)
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"{self.parts['scale']} has values that are not finite. The checkpoint is damaged.")
        return scales

    def decode(self, parts: Parts) -> Tensor:
        codes, scales = parts["codes"], self._scales(parts)
        out = codes.to(torch.float32)
        multiply_blocks(out, scales, self.block)
        return out

    def kept(self, files: StoredFiles) -> Kept:
        fmt, columns = get_format("fp8"), self.shape[-1]
        if not self.standard:
            return Kept((), "its codes are not of the type e4m3fn")
        if columns % fmt.block:
            return Kept((), f"{columns} columns are not a multiple of {fmt.block}, which fp8 needs")
        if self.grid[1] > 1 and self.block[1] % fmt.block:
            return Kept((), f"{self.block[1]} columns share a scale, and in fp8 {fmt.block} do")
        if files.headers[self.parts["scale"]].dtype == torch.float64:
            return Kept((), "its scales are float64")
        return Kept((fmt,))

    def blocks(self, parts: Parts, fmt: QuantFormat) -> Tensor:
        rows, columns = self.shape[-2:]
        scales = self._scales(parts)
        if bool((scales < 0).any()):
            raise ValueError(f"{self.parts['scale']} has negative values. The checkpoint is damaged.")
        codes = parts["codes"].contiguous().view(torch.uint8).view(-1, fmt.block)
        if bool((codes & 127 == 127).any()):
            raise ValueError(f"{self.parts['codes']} has codes that are not numbers. The checkpoint is damaged.")
        per_block = scales if self.grid[1] == 1 else scales.repeat_interleave(self.block[1] // fmt.block, 1)
        per_block = per_block[:, : columns // fmt.block].expand(-1, columns // fmt.block)
        per_block = per_block.repeat_interleave(self.block[0], 0)[:rows].reshape(-1, 1)
        out = torch.empty(len(codes), fmt.block_bytes, dtype=torch.uint8)  # the codes are not copied twice
        scale, qs = fmt.parts
        out[:, scale.offset : scale.offset + scale.nbytes] = per_block.view(torch.uint8)
        out[:, qs.offset : qs.offset + qs.nbytes] = codes
        return out.view(rows, -1)


def as_scales(scales: Tensor) -> Tensor:
    """Scales as f32. Bytes are exponents: s stands for 2**(s - 127)."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.double() - 127).float()
    return scales.to(torch.float32)


def multiply_blocks(out: Tensor, scales: Tensor, block: tuple[int, int]) -> None:
    """Multiply a matrix in place by a scale for each block of rows and columns. The last blocks may be shorter."""
    down, right = block
    rows, columns = out.shape
    if right < columns and columns % right == 0:  # a view of the columns needs no wide scales
        wide = out.view(rows, columns // right, right)
        each = scales[:, :, None]
    else:
        wide, each = out[:, None, :], scales.repeat_interleave(right, 1)[:, None, :columns]
    whole = rows // down
    if whole:
        wide[: whole * down].view(whole, down, *wide.shape[1:]).mul_(each[:whole, None])
    if rows % down:
        wide[whole * down :].mul_(each[whole:])


def fp8_weight(
    name: str, scale: str, files: StoredFiles, block: tuple[int, int] | None, method: str, codes: str | None = None
) -> Fp8Weight:
    """The weight of codes and scales, whose shapes are checked.

    Args:
        name: of the weight in a checkpoint of floats.
        scale: name of the tensor of scales.
        files: the checkpoint.
        block: rows and columns of a block, from the configuration; None: it names none.
        method: for messages.
        codes: name of the tensor of codes; None: `name`.
    """
    codes = codes or name
    check_type(files, scale, *FLOATS, torch.uint8, torch.float8_e8m0fnu)
    shape, scales = files.headers[codes].shape, files.headers[scale].shape
    if len(shape) not in (2, 3):
        raise ValueError(f"{codes} is {list(shape)}, must have 2 or 3 dimensions. The checkpoint is damaged.")
    inner = scales[1:] if len(shape) == 3 and scales[:1] == shape[:1] else scales
    grid, size = _grid(shape[-2:], inner, block)
    if grid is None:
        blocks = "" if block is None else f" with blocks of {block[0]} x {block[1]}"
        raise ValueError(
            f"{scale} is {list(scales)}, which are not the scales of {codes} {list(shape)}{blocks}. The checkpoint is damaged."
        )
    if size == block:
        what = f"{method} (blocks of {size[0]} x {size[1]})"
    elif size == tuple(shape[-2:]):
        what = f"{method} (one scale)"
    elif size == (1, shape[-1]):
        what = f"{method} (a scale for each row)"
    else:
        what = f"{method} (blocks of {size[0]} x {size[1]})"
    standard = files.headers[codes].dtype == torch.float8_e4m3fn
    return Fp8Weight(name, tuple(shape), {"codes": codes, "scale": scale}, what, size, grid, standard)


def _grid(
    matrix: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """(shape of the scales, rows and columns of a block); (None, ..) if the scales do not belong to the matrix."""
    rows, columns = matrix
    count = 1
    for each in scales:
        count *= each
    if block is not None and scales == (-(-rows // block[0]), -(-columns // block[1])):
        return (scales[0], scales[1]), block
    if count == 1 and (block is None or len(scales) < 2):
        return (1, 1), (rows, columns)
    if scales in ((rows,), (rows, 1)):
        return (rows, 1), (1, columns)
    if scales == (rows, -(-columns // _MX)):
        return (rows, scales[1]), (1, _MX)
    if block is None and len(scales) == 2 and 0 not in scales and rows % scales[0] == 0 and columns % scales[1] == 0:
        return (scales[0], scales[1]), (rows // scales[0], columns // scales[1])
    return None, (0, 0)


class Fp8(StoredMethod):
    """FP8 of DeepSeek, Qwen, Mistral, FBGEMM and transformers. Weights that are not FP8 are floats."""

    def __init__(self, name: str, block: tuple[int, int] | None) -> None:
        self.name, self.block = name, block

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        if files.headers[name].dtype not in CODES or len(files.headers[name].shape) < 2:
            return None
        stem = name.removesuffix(".weight")
        candidates = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
        scale = companion(files, name, candidates, self.name)
        if scale == name:
            raise ValueError(f"{name} is FP8 without scales. The checkpoint is damaged.")
        return fp8_weight(name, scale, files, self.block, self.name)

    def is_extra(self, name: str) -> bool:
        return is_extra(name)


def is_extra(name: str) -> bool:
    """Whether a tensor is a scale of activations or of the cache."""
    last = name.rpartition(".")[2]
    return last in _EXTRA or last.endswith(("_activation_scale", "_input_scale"))
