"""PackedModule, the base of the quantized layers: packed bytes are never cast, and the replaced layer is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import isqtorch.ops  # noqa: F401  (registers torch.ops.isqtorch)
from isqtorch.formats import QuantFormat, get_format

from .parameter import PackedParameter
from .plausible import unknown_fault
from .savers import check_saver

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels compute with
_TWIN = "_isqtorch_packed"  # attribute of a plain parameter: the packed one that took its place


class PackedModule(nn.Module):
    """Base of the modules with a packed weight (QuantExperts has several, with other names).

    Attributes:
        weight: uint8 `[N, row_bytes]`, a parameter that never requires a gradient.
        format: canonical name of the format of `weight`.
        dtype: the float type of the layer: of the result of `dequantize`, and of the rows of an embedding. `.half()`,
            `.bfloat16()` and `.to(dtype)` change it; they never change the packed bytes.
        origin: class of the replaced layer: nn.Linear, nn.Embedding or transformers' Conv1D.
        subclass: class of the replaced layer if it is a known subclass of `origin` (subclasses.py), else None.
        subclass_attributes: attributes that the constructor of the subclass had set on the replaced layer.
        origin_requires_grad: whether the replaced weight was trainable; `dequantize_` restores it.
    """

    # transformers' tensor parallelism: split this parameter by its own shape
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
        """{name of a packed parameter: name of its format}."""
        return {"weight": self.format}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, over all packed parameters."""
        bits = numel = 0
        for name, format in self.packed.items():
            fmt, packed = get_format(format), getattr(self, name)
            bits += 8 * packed.numel()
            numel += packed.numel() // fmt.block_bytes * fmt.block
        return bits / numel if numel else get_format(next(iter(self.packed.values()))).bits_per_weight

    def dequantize(self, name: str = "weight") -> Tensor:
        """Decode the packed parameter `name`: `[N, K]`, for experts `[E, N, K]`, in `self.dtype`."""
        return decoded(getattr(self, name), self.packed[name], self.dtype)

    def as_before(self, name: str) -> Tensor:
        """A packed weight decoded, as the layer that this one replaced stored it: of a Conv1D `[K, N]`."""
        weight = self.dequantize(name)
        return weight.transpose(-2, -1) if self.is_turned() else weight

    def decoded_rows(self, packed: Tensor) -> Tensor:
        """Rows of the weight, uint8 `[n, row_bytes]`, decoded: `[n, K]`."""
        return decoded(packed, next(iter(self.packed.values())), self.dtype)

    def is_turned(self) -> bool:
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
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, parameter in list(self._parameters.items()):
            if parameter is not None:
                self.register_parameter(name, parameter)

    # ---- packed bytes are never cast ---------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Implement `.to()`, `.half()`, `.cuda()`, ...: casts change `self.dtype` and the bias, never packed bytes."""

        def keep_bytes(tensor: Tensor) -> Tensor:
            tensor = tensor.plain if isinstance(tensor, PackedParameter) else tensor
            out = fn(tensor)
            if tensor.dtype == torch.uint8 and out.dtype != torch.uint8:  # .type(torch.float16) casts all tensors
                return tensor.to(out.device)
            return out

        probe = fn(torch.empty(1, dtype=self.dtype, device=next(self.parameters(recurse=False)).device))
        super()._apply(keep_bytes, recurse)  # type: ignore[no-untyped-call]
        if probe.dtype.is_floating_point:
            self.dtype = probe.dtype
        return self

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save as nn.Module does, and store the formats in the metadata of the state dict, beside the version.

        Functions that would write the bytes without the metadata get a ValueError; see `savers.py`.
        """
        for name, format in self.packed.items():
            check_saver(f"{prefix}{name}", format)
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
        """Load as nn.Module does, but report an error for weights of another type or format; they are never cast.

        If the state dict does not say the format, its bytes are judged instead; see `plausible.py`.
        """
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
            elif name not in stored:
                fault = unknown_fault(key, incoming, get_format(format), error_msgs)
                faults += [] if fault is None else [fault]
        if faults:
            error_msgs.extend(faults)
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )


def decoded(packed: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """The weights of packed bytes in any float type. The operators give three; others are made of float32, exactly."""
    native = dtype if dtype in FLOAT_DTYPES else torch.float32
    weight: Tensor = torch.ops.isqtorch.dequantize(packed, format, native)
    return weight.to(dtype)


def packed_parameter(packed: Tensor) -> nn.Parameter:
    """Return `packed` as a parameter. A parameter stays the same object, so tied weights stay tied."""
    return packed if isinstance(packed, nn.Parameter) else PackedParameter(packed)


def packed_shape(op: str, packed: Tensor, fmt: QuantFormat) -> tuple[int, int]:
    """Return (N, K). Raise ValueError unless `packed` is uint8 [N, row_bytes]."""
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise ValueError(
            f"{op}: the packed weight must be uint8 [N, row_bytes], got {packed.dtype} {list(packed.shape)}"
        )
    return packed.shape[0], fmt.in_features(packed.shape[1])


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make ordinary tensors without autograd, even inside `torch.inference_mode()`.

    Modules keep these tensors. An inference tensor in a module could not be used in training later.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
