"""What the quantized layers share: packed weights that nothing may cast, and the memory of what they replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import isqtorch.ops  # noqa: F401  (registers torch.ops.isqtorch)
from isqtorch.formats import QuantFormat, get_format

from .parameter import PackedParameter

_TWIN = "_isqtorch_packed"  # attribute of a plain parameter: the packed one that took its place


class PackedModule(nn.Module):
    """Base of the modules that hold a packed weight (QuantExperts: several, with other names).

    Attributes:
        weight: uint8 `[N, row_bytes]`, a parameter that never asks for a gradient.
        format: canonical name of the format of `weight`.
        dtype: the float type the layer stands for: what `dequantize` gives, and the output of an embedding. It follows
            `.half()`, `.bfloat16()` and `.to(dtype)`; the packed bytes do not.
        origin: what this layer replaced: nn.Linear, nn.Embedding or transformers' Conv1D.
        subclass: the class it replaced where that is an understood subclass of `origin` (subclasses.py).
        subclass_attributes: what the constructor of the subclass had left on the replaced layer.
        origin_requires_grad: whether the replaced weight was trainable; `dequantize_` gives it back.
    """

    # transformers' tensor parallel: shard this parameter as it is, by its own shape
    _hf_quantized_needs_local_tp = True

    weight: Tensor
    format: str
    dtype: torch.dtype
    origin: type[nn.Module]
    origin_requires_grad: bool
    subclass: type[nn.Module] | None = None
    subclass_attributes: dict[str, Any]

    def _set_format(self, format: QuantFormat | str, dtype: torch.dtype | None, origin: type[nn.Module]) -> QuantFormat:
        fmt = get_format(format)
        self.format = fmt.name
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if not self.dtype.is_floating_point:
            raise ValueError(f"{type(self).__name__}: dtype must be a float type, got {self.dtype}")
        self.origin = origin
        self.subclass_attributes = {}
        self.origin_requires_grad = True
        return fmt

    @property
    def packed(self) -> dict[str, str]:
        """{name of a packed parameter: its format}"""
        return {"weight": self.format}

    @property
    def bits_per_weight(self) -> float:
        """Over all packed parameters."""
        bits = numel = 0
        for name, format in self.packed.items():
            fmt, packed = get_format(format), getattr(self, name)
            bits += 8 * packed.numel()
            numel += packed.numel() // fmt.block_bytes * fmt.block
        return bits / numel if numel else get_format(next(iter(self.packed.values()))).bits_per_weight

    def dequantize(self, name: str = "weight") -> Tensor:
        """The weights as they are computed with: `[N, K]`, for experts `[E, N, K]`, in `self.dtype`."""
        weight: Tensor = torch.ops.isqtorch.dequantize(getattr(self, name), self.packed[name], self.dtype)
        return weight

    def as_before(self, name: str) -> Tensor:
        """A packed weight decoded, as the layer that this one replaced stored it: of a Conv1D `[K, N]`."""
        weight = self.dequantize(name)
        return weight.transpose(-2, -1) if self._is_turned() else weight

    def _is_turned(self) -> bool:
        """Whether the layer that this one replaced stores its weight as `[K, N]`."""
        return self.origin not in (nn.Linear, nn.Embedding)

    # ---- readers outside of this layer get floats --------------------------------------------------------------------

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module; a packed weight becomes a `PackedParameter`, the same one wherever it is shared."""
        if type(param) is nn.Parameter and param.dtype == torch.uint8:
            twin = vars(param).get(_TWIN)
            if twin is None:
                twin = vars(param)[_TWIN] = PackedParameter(param, **vars(param))
            param = twin
        super().register_parameter(name, param)
        if isinstance(param, PackedParameter):
            param.belongs_to(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After copy and pickle, which know nothing of owners."""
        super().__setstate__(state)
        for name, parameter in list(self._parameters.items()):
            if parameter is not None:
                self.register_parameter(name, parameter)

    # ---- nothing casts packed bytes ----------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """`.to()`, `.half()`, `.cuda()`, ...: the bytes move, the float type changes, and bytes are never cast."""

        def keep_bytes(tensor: Tensor) -> Tensor:
            tensor = tensor.plain if isinstance(tensor, PackedParameter) else tensor
            out = fn(tensor)
            if tensor.dtype == torch.uint8 and out.dtype != torch.uint8:  # .type(torch.float16) casts everything
                return tensor.to(out.device)
            return out

        probe = fn(torch.empty(1, dtype=self.dtype, device=next(self.parameters(recurse=False)).device))
        super()._apply(keep_bytes, recurse)  # type: ignore[no-untyped-call]
        if probe.dtype.is_floating_point:
            self.dtype = probe.dtype
        return self

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As nn.Module; the format goes into the metadata beside the version, where it changes no tensor."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})["formats"] = dict(self.packed)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As nn.Module, but weights of another type or format are an error, never a cast."""
        faults = []
        stored = local_metadata.get("formats", {})
        for name, format in self.packed.items():
            key = f"{prefix}{name}"
            incoming = state_dict.get(key)
            if isinstance(incoming, Tensor) and incoming.dtype != torch.uint8:
                faults.append(
                    f"{key}: this layer holds {format} bytes and cannot load {incoming.dtype} weights. "
                    "Load them before quantize_, or call dequantize_ first."
                )
            elif stored.get(name, format) != format:
                faults.append(
                    f"{key}: this layer is {format}, the state dict holds {stored[name]}. Quantize with that format first."
                )
        if faults:
            error_msgs.extend(faults)
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )


def packed_parameter(packed: Tensor) -> nn.Parameter:
    """`packed` as a parameter; a parameter stays the same object, so that tied weights stay tied."""
    return packed if isinstance(packed, nn.Parameter) else PackedParameter(packed)


def check_packed(op: str, packed: Tensor, fmt: QuantFormat) -> tuple[int, int]:
    """(N, K) of a packed matrix; ValueError if it is none."""
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise ValueError(
            f"{op}: the packed weight must be uint8 [N, row_bytes], got {packed.dtype} {list(packed.shape)}"
        )
    return packed.shape[0], fmt.in_features(packed.shape[1])


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """No autograd, and no inference tensors even inside `torch.inference_mode()`: what is made here lives in a module."""
    with torch.inference_mode(False), torch.no_grad():
        yield
