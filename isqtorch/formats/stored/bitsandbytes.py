"""bitsandbytes: 4-bit codes of a table (nf4, fp4) with a scale for each run of weights, and int8 with a scale for each row.

The runs go over the whole weight, row after row, so they may cross the end of a row. With "double quantization" the
scales themselves are codes of a table, with scales of their own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import FLOATS, Parts, StoredFiles, StoredMethod, StoredWeight, check_shape, check_type, companion

_STATE = ".quant_state.bitsandbytes__"
_MOST_JSON = 1 << 16  # bytes


@dataclass(frozen=True)
class TableWeight(StoredWeight):
    """Parts `codes` u8 `[N * K / 2, 1]`, `absmax`, `table` f32 `[16]`, perhaps `nested_absmax` and `nested_table`."""

    run: int  # weights that share a scale
    nested_run: int  # scales that share a scale
    nested_offset: float

    def decode(self, parts: Parts) -> Tensor:
        count = math.prod(self.shape)
        table, octets = parts["table"].to(torch.float32), parts["codes"].reshape(-1).int()
        out = torch.stack([table[octets >> 4], table[octets & 15]], dim=-1).flatten()[
            :count
        ]  # the first in the high bits
        scales = self._scales(parts)
        whole = count // self.run
        out[: whole * self.run].view(whole, self.run).mul_(scales[:whole, None])
        out[whole * self.run :].mul_(scales[whole:].sum())  # the last run is shorter, or there is none
        return out.view(self.shape)

    def _scales(self, parts: Parts) -> Tensor:
        absmax = parts["absmax"]
        if "nested_absmax" not in parts:
            return absmax.to(torch.float32)
        outer = parts["nested_absmax"].to(torch.float32).repeat_interleave(self.nested_run)[: absmax.numel()]
        return parts["nested_table"].to(torch.float32)[absmax.int()] * outer + self.nested_offset


@dataclass(frozen=True)
class RowWeight(StoredWeight):
    """Parts `codes` i8 `[N, K]` and `scale` f32 `[N]`."""

    bits: ClassVar[int] = 8

    def decode(self, parts: Parts) -> Tensor:
        out = parts["codes"].to(torch.float32)
        return out.mul_(parts["scale"].to(torch.float32)[:, None]).mul_(1 / 127)


class BitsAndBytes(StoredMethod):
    """A checkpoint of bitsandbytes. Weights without a state beside them are floats."""

    name = "bitsandbytes"

    def weight(self, name: str, files: StoredFiles) -> StoredWeight | None:
        header = files.headers[name]
        if header.dtype == torch.int8 and name.endswith(".weight"):
            return self._rows(name, files)
        if _STATE in name:
            return self._table(name, files)
        if header.dtype == torch.uint8 and name.endswith(".weight"):
            companion(files, name, tuple(f"{name}{_STATE}{kind}" for kind in ("nf4", "fp4")), self.name)
        return None

    def is_extra(self, name: str) -> bool:
        return name.endswith(".weight_format")

    def _rows(self, name: str, files: StoredFiles) -> StoredWeight:
        stem = name.removesuffix("weight")
        scale = companion(files, name, (f"{stem}SCB",), self.name)
        check_type(files, scale, *FLOATS)
        shape = files.headers[name].shape
        if len(shape) != 2:
            raise ValueError(f"{name} is {list(shape)}, must have two dimensions. The checkpoint is damaged.")
        check_shape(files, scale, shape[:1])
        kind = f"{stem}weight_format"
        if kind in files.headers and int(files.read(kind, None).sum()) != 0:
            raise NotImplementedError(
                f"{name} is stored by bitsandbytes in the order of one kind of GPU, only rows are read"
            )
        return RowWeight(name, tuple(shape), {"codes": name, "scale": scale}, f"{self.name} (int8)")

    def _table(self, state: str, files: StoredFiles) -> StoredWeight:
        name, _, kind = state.partition(_STATE)
        if name not in files.headers:
            raise ValueError(f"the checkpoint has {state} and no {name}. It is damaged, or not complete.")
        parts = {"codes": name, "state": state}
        for role, leaf in (("absmax", "absmax"), ("table", "quant_map")):
            parts[role] = companion(files, name, (f"{name}.{leaf}",), self.name)
        told = self._state(state, files)
        shape = told["shape"]
        count = math.prod(shape)
        run, nested_run, offset = told["blocksize"], 1, 0.0
        check_type(files, name, torch.uint8)
        check_shape(files, name, (-(-count // 2), 1), (-(-count // 2),), (1, -(-count // 2)))
        check_type(files, parts["table"], *FLOATS)
        check_shape(files, parts["table"], (16,))
        runs = -(-count // run)
        check_shape(files, parts["absmax"], (runs,), (runs, 1))
        if f"{name}.nested_absmax" in files.headers:
            parts["nested_absmax"] = f"{name}.nested_absmax"
            parts["nested_table"] = companion(files, name, (f"{name}.nested_quant_map",), self.name)
            nested_run, offset = told["nested_blocksize"], told["nested_offset"]
            check_type(files, parts["absmax"], torch.uint8)
            for role, size in (("nested_absmax", -(-runs // nested_run)), ("nested_table", 256)):
                check_type(files, parts[role], *FLOATS)
                check_shape(files, parts[role], (size,))
        else:
            check_type(files, parts["absmax"], *FLOATS)
        return TableWeight(name, tuple(shape), parts, f"{self.name} ({kind})", run, nested_run, offset)

    def _state(self, state: str, files: StoredFiles) -> dict[str, Any]:
        """The description of a weight, checked: JSON in a tensor of bytes."""
        check_type(files, state, torch.uint8)
        shape = files.headers[state].shape
        if len(shape) != 1 or shape[0] > _MOST_JSON:
            raise ValueError(
                f"{state} is {list(shape)}, must be at most {_MOST_JSON} bytes. The checkpoint is damaged."
            )
        try:
            told = json.loads(bytes(files.read(state, None).tolist()).decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{state} is no JSON: {error}. The checkpoint is damaged.") from None
        if not isinstance(told, dict):
            raise ValueError(f"{state} must be an object of JSON. The checkpoint is damaged.")
        size, run, nested = told.get("shape"), told.get("blocksize"), told.get("nested_blocksize", 256)
        offset = told.get("nested_offset", 0.0)
        good = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        numbers = all(type(n) is int and n > 0 for n in (run, nested))
        if not good or not numbers or type(offset) not in (int, float) or not math.isfinite(offset):
            raise ValueError(
                f"{state} has no valid shape, blocksize or offset: {str(told)[:200]}. The checkpoint is damaged."
            )
        return {"shape": size, "blocksize": run, "nested_blocksize": nested, "nested_offset": float(offset)}
