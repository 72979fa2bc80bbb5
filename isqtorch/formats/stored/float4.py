"""MXFP4 and NVFP4: 4-bit floating-point codes (E2M1), two in a byte, the first in the low nibble.

MXFP4 has a power of two for 32 weights. NVFP4 has an FP8 scale for 16 weights, and one more scale for the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch.formats.base import QuantFormat, get_format
from isqtorch.formats.codebook import E2M1_LEVELS, mxfp4_blocks

from .base import FLOATS, Kept, Parts, StoredFiles, StoredMethod, StoredWeight, check_shape, check_type, companion
from .float8 import as_scales

_GROUP, _SMALL_GROUP = 32, 16
_AT_ONCE = 1 << 20  # weights whose nibbles are sorted at a time


def e2m1(codes: Tensor) -> Tensor:
    """The values of codes, two in a byte: uint8 `[.., n]` -> f32 `[.., 2 n]`."""
    levels = torch.tensor(E2M1_LEVELS, dtype=torch.float32, device=codes.device) / 2
    pairs = torch.stack([levels[(codes & 15).int()], levels[(codes >> 4).int()]], dim=-1)
    return pairs.flatten(-2)


@dataclass(frozen=True)
class Mxfp4Weight(StoredWeight):
    """Parts `codes` u8 `[N, K / 32, 16]` or `[N, K / 2]`, and `scale` u8 `[N, K / 32]`; all may have experts first."""

    def decode(self, parts: Parts) -> Tensor:
        rows, columns = self.shape[-2:]
        out = e2m1(parts["codes"].reshape(rows, columns // 2)).view(rows, columns // _GROUP, _GROUP)
        return out.mul_(as_scales(parts["scale"])[..., None]).view(rows, columns)

    def kept(self, files: StoredFiles) -> Kept:
        return Kept((get_format("mxfp4"),))

    def blocks(self, parts: Parts, fmt: QuantFormat) -> Tensor:
        rows, columns = self.shape[-2:]
        scale = parts["scale"].view(torch.uint8)
        if bool((scale == 255).any()):
            raise ValueError(f"{self.parts['scale']} has scales that are not numbers. The checkpoint is damaged.")
        codes = parts["codes"].reshape(rows, columns // 2)
        out = torch.empty(rows, fmt.row_bytes(columns), dtype=torch.uint8)
        step = max(1, _AT_ONCE // columns)
        for start in range(0, rows, step):
            out[start : start + step] = mxfp4_blocks(codes[start : start + step], scale[start : start + step])
        return out


class Mxfp4(StoredMethod):
    """The experts of gpt-oss: `NAME_blocks` [E, N, K / 32, 16] and `NAME_scales` [E, N, K / 32]."""

    name = "mxfp4"

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        if not name.endswith("_blocks"):
            return None
        stem = name.removesuffix("_blocks")
        scale = companion(files, stem, (f"{stem}_scales",), self.name)
        check_type(files, name, torch.uint8)
        check_type(files, scale, torch.uint8)
        shape = files.headers[name].shape
        if len(shape) not in (3, 4) or shape[-1] != _GROUP // 2:
            raise ValueError(f"{name} is {list(shape)}, must be [.., N, K / 32, 16]. The checkpoint is damaged.")
        check_shape(files, scale, shape[:-1])
        full = (*shape[:-2], shape[-2] * _GROUP)
        return Mxfp4Weight(stem, full, {"codes": name, "scale": scale}, self.name)


@dataclass(frozen=True)
class Nvfp4Weight(StoredWeight):
    """Parts `codes` u8 `[N, K / 2]`, `scale` e4m3 `[N, K / 16]`, and perhaps `outer` with one number."""

    divides: bool  # whether the outer scale divides

    def decode(self, parts: Parts) -> Tensor:
        rows, columns = self.shape[-2:]
        scales = parts["scale"].to(torch.float32)
        if "outer" in parts:
            outer = parts["outer"].to(torch.float32).reshape(())
            if not bool(torch.isfinite(outer)) or (self.divides and float(outer) == 0.0):
                raise ValueError(f"{self.parts['outer']} is {float(outer)}. The checkpoint is damaged.")
            scales = scales / outer if self.divides else scales * outer
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"{self.parts['scale']} has values that are not finite. The checkpoint is damaged.")
        out = e2m1(parts["codes"]).view(rows, columns // _SMALL_GROUP, _SMALL_GROUP)
        return out.mul_(scales[..., None]).view(rows, columns)


def fp4_weight(name: str, codes: str, files: StoredFiles, method: str, *, divides: bool) -> StoredWeight:
    """The weight of 4-bit floating-point codes: MXFP4 if its scales are powers of two of 32 weights, else NVFP4.

    Args:
        name: of the weight in a checkpoint of floats.
        codes: name of the tensor of codes.
        files: the checkpoint.
        method: for messages.
        divides: whether the outer scale divides, as in compressed-tensors; ModelOpt multiplies.
    """
    check_type(files, codes, torch.uint8)
    scale = companion(files, codes, (f"{name}_scale",), method)
    shape = files.headers[codes].shape
    if len(shape) not in (2, 3):
        raise ValueError(f"{codes} is {list(shape)}, must have 2 or 3 dimensions. The checkpoint is damaged.")
    full = (*shape[:-1], 2 * shape[-1])
    parts = {"codes": codes, "scale": scale}
    if files.headers[scale].dtype in (torch.uint8, torch.float8_e8m0fnu):
        check_shape(files, scale, (*shape[:-1], full[-1] // _GROUP))
        if full[-1] % _GROUP:
            raise ValueError(
                f"{codes} is {list(shape)}, and a row has no whole groups of 32. The checkpoint is damaged."
            )
        return Mxfp4Weight(name, full, parts, f"{method} (mxfp4)")
    check_type(files, scale, torch.float8_e4m3fn, *FLOATS)
    check_shape(files, scale, (*shape[:-1], full[-1] // _SMALL_GROUP))
    if full[-1] % _SMALL_GROUP:
        raise ValueError(f"{codes} is {list(shape)}, and a row has no whole groups of 16. The checkpoint is damaged.")
    outer = f"{name}_global_scale" if divides else f"{name}_scale_2"
    if outer in files.headers:
        check_type(files, outer, *FLOATS)
        lead = shape[:1] if len(shape) == 3 else ()
        check_shape(files, outer, (), (1,), lead, (*lead, 1), (*lead, 1, 1))
        parts["outer"] = outer
    return Nvfp4Weight(name, full, parts, f"{method} (nvfp4)", divides)
