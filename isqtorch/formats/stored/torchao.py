"""torchao in safetensors files: `_weight_qdata` with its companions, and the class of the tensor in the metadata."""

from __future__ import annotations

import json
import re

import torch

from .base import StoredFiles, StoredMethod, StoredWeight, companion
from .compressed import bytes_weight
from .float8 import CODES, fp8_weight

_CODES = re.compile(r"^(.*\.)?_(\w+)_qdata$")
_OLD = re.compile(r":_?(data|qdata|tensor_impl)")
_READ = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")


class TorchAo(StoredMethod):
    """A checkpoint of torchao whose codes fill a byte each: FP8, int8, and smaller integers in bytes."""

    name = "torchao"

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        if _OLD.search(name):
            raise NotImplementedError(
                f"{name}: torchao checkpoints in this older layout are not read. Save it with a newer torchao."
            )
        match = _CODES.match(name)
        if match is None:
            return None
        stem = f"{match[1] or ''}_{match[2]}"
        plain = f"{match[1] or ''}{match[2]}"
        kind = self._kind(plain, files)
        dtype = files.headers[name].dtype
        scale = companion(files, name, (f"{stem}_scale",), self.name)
        if kind in ("", "Float8Tensor") and dtype in CODES:
            return fp8_weight(plain, scale, files, None, self.name, codes=name)
        if kind in ("", "Int8Tensor", "IntxUnpackedToInt8Tensor") and dtype == torch.int8:
            return bytes_weight(plain, name, scale, f"{stem}_zero_point", files, self.name)
        raise NotImplementedError(
            f"{name}: torchao's {kind or 'tensor'} of {str(dtype).removeprefix('torch.')} is not read, only {', '.join(_READ)}"
        )

    def is_extra(self, name: str) -> bool:
        return name.endswith(("_act_pre_scale", "_act_quant_scale"))

    def _kind(self, name: str, files: StoredFiles) -> str:
        """The class of the tensor; empty if the metadata does not name it."""
        text = files.metadata.get(name)
        if text is None:
            return ""
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict) or not isinstance(told.get("_type"), str):
            raise ValueError(
                f"the metadata of {name} is no description of a tensor: {text[:80]!r}. The checkpoint is damaged."
            )
        return str(told["_type"])[:80]
