"""NVIDIA ModelOpt: FP8 with one scale, and NVFP4 with a second scale that multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .base import StoredFiles, StoredMethod, StoredWeight, companion
from .float4 import fp4_weight
from .float8 import CODES, fp8_weight, is_extra

_READ = ("FP8", "NVFP4", "MIXED_PRECISION")


class ModelOpt(StoredMethod):
    """A checkpoint of ModelOpt."""

    name = "modelopt"

    def __init__(self, entry: Mapping[str, Any]) -> None:
        inner = entry.get("quantization")
        told = entry.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, Mapping) else None)
        if told not in _READ:
            raise NotImplementedError(
                f"a ModelOpt checkpoint of the kind {str(told)[:80]!r} is not read, only {', '.join(_READ)}"
            )

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        header = files.headers[name]
        if len(header.shape) < 2 or not name.endswith("weight"):
            return None
        if header.dtype in CODES:
            return fp8_weight(name, companion(files, name, (f"{name}_scale",), self.name), files, None, self.name)
        if header.dtype == torch.uint8:
            return fp4_weight(name, name, files, self.name, divides=False)
        return None

    def is_extra(self, name: str) -> bool:
        return is_extra(name)
