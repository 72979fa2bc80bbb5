"""MXFP4 and NVFP4: 4-bit floating-point codes (E2M1), two in a byte, the first in the low nibble.

MXFP4 has a power of two for 32 weights. NVFP4 has an FP8 scale for 16 weights, and one more scale for the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch.formats.base import QuantFormat, get_format
from isqtorch.formats.codebook import E2M1_LEVELS, mxfp4_blocks

from .base import Kept, Parts, StoredFiles, StoredMethod, StoredWeight, check_shape, check_type, companion
from .float8 import as_scales

_GROUP, _SMALL_GROUP = 32, 16


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
        return Kept(get_format("mxfp4"))

    def blocks(self, parts: Parts, fmt: QuantFormat) -> Tensor:
        rows, columns = self.shape[-2:]
        if bool((parts["scale"] == 255).any()):
            raise ValueError(f"{self.parts['scale']} has scales that are not numbers. The checkpoint is damaged.")
        return mxfp4_blocks(parts["codes"].reshape(rows, columns // 2), parts["scale"])


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
