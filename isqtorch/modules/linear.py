"""QuantLinear: nn.Linear over a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from isqtorch.formats import QuantFormat, get_format

from .packed import PackedModule, check_packed, ordinary_tensors, packed_parameter
from .parameter import PackedParameter

_linear = torch.ops.isqtorch.linear.default  # the overload itself: looking it up in each call costs a microsecond
_linear_frozen = torch.ops.isqtorch.linear_frozen.default._op  # without OpOverload.__call__, which only passes on
_w8a8 = torch.ops.isqtorch.linear_w8a8.default
_w8a8_frozen = torch.ops.isqtorch.linear_w8a8_frozen.default._op
_is_compiling, _functorch_is_active = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active


class QuantLinear(PackedModule, nn.Linear):
    """y = x @ dequantize(weight)^T + bias, with `weight` packed in a quantized format.

    A subclass of nn.Linear, so that whoever looks for linear layers finds it. Usually made by `quantize_`, from a layer with
    `from_float`, or from bytes with `from_packed`; the constructor makes one of zeros to load a state dict into.

    Args:
        in_features: K, a multiple of the format's block.
        out_features: N.
        bias: whether there is a bias `[N]`, of type `dtype`.
        format: format or its name.
        device: where to allocate; "meta" allocates nothing.
        dtype: the float type the layer stands for.

    Attributes:
        activations: "fp8" for a weight in fp8: x may be rounded to FP8, too, each run of 128 columns under its own scale, where
            that is faster (`torch.ops.isqtorch.linear_w8a8`). None: x is used as it is.

    Shapes: x `[..., K]` in f32, f16 or bf16; result `[..., N]` of the same type.
    """

    _activations: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: QuantFormat | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a float weight
        fmt = self._set_format(format, dtype, nn.Linear)
        self.in_features = in_features
        self.out_features = out_features
        packed = torch.zeros(out_features, fmt.row_bytes(in_features), dtype=torch.uint8, device=device)
        self.weight = PackedParameter(packed)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_packed(
        cls, packed: Tensor, format: QuantFormat | str, *, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """A layer over bytes that exist: uint8 `[N, row_bytes]`. Parameters are taken over as they are, not copied."""
        fmt = get_format(format)
        rows, in_features = check_packed("QuantLinear.from_packed", packed, fmt)
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"QuantLinear.from_packed: bias must be [{rows}], got {list(bias.shape)}")
        layer = cls(in_features, rows, bias=False, format=fmt, device="meta", dtype=dtype)
        layer.weight = packed_parameter(packed)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        format: QuantFormat | str,
        *,
        importance: Tensor | None = None,
        rule: str | None = None,
    ) -> QuantLinear:
        """Quantize the weight of `linear`, which stays as it was; the bias is shared with it.

        Raises:
            ValueError: K does not fit the format, or a weight is not finite.
        """
        fmt = get_format(format)
        with ordinary_tensors():
            packed = torch.ops.isqtorch.quantize(linear.weight, fmt.name, importance, rule)
        return cls.from_packed(packed, fmt, bias=linear.bias, dtype=linear.weight.dtype)

    @property
    def activations(self) -> str | None:
        return self._activations

    @activations.setter
    def activations(self, value: str | None) -> None:
        if value is not None and value != get_format(self.format).activations:
            raise ValueError(
                f'QuantLinear: activations must be None, or "fp8" for a weight in fp8; got {value!r} for one in {self.format}'
            )
        self._activations = value

    def forward(self, x: Tensor) -> Tensor:
        # nn.Module finds self.weight by way of an AttributeError, as slowly as all else here takes. FSDP1 has it elsewhere.
        own = self._parameters
        weight = own["weight"] if "weight" in own else self.weight
        weight = weight.plain if type(weight) is PackedParameter else weight  # `plain_bytes`, without its call
        bias = own["bias"] if "bias" in own else self.bias
        if torch._C._is_any_autocast_enabled():
            device = x.device.type
            if device != "meta" and torch.is_autocast_enabled(device):  # nn.Linear's product is cast, so this is, too
                x = x.to(torch.get_autocast_dtype(device))
        compiling = _is_compiling()
        if not compiling and (forward_ad._current_level >= 0 or _functorch_is_active()):
            # torch.func and forward mode do not know the operator's gradient; forward mode would take it for zero.
            w = torch.ops.isqtorch.dequantize(weight, self.format, x.dtype)
            return nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
        # The gradient of `linear` is a Python function, which costs more than a small layer: it is passed by where there is
        # none to record. Tracers must see the ordinary operator.
        y: Tensor
        if compiling or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
            y = (_linear if self._activations is None else _w8a8)(x, weight, self.format, bias)
        else:
            y = (_linear_frozen if self._activations is None else _w8a8_frozen)(x, weight, self.format, bias)
        return y

    def reset_parameters(self) -> None:
        """Back to zeros, as the constructor leaves it: packed bytes cannot be initialized randomly."""
        with torch.no_grad():
            self.weight.zero_()
            if self.bias is not None:
                self.bias.zero_()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.format}, {self.bits_per_weight:.2f} bpw"
            + (f", activations={self.activations}" if self.activations else "")
        )
