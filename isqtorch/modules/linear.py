"""QuantLinear: nn.Linear with a packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from isqtorch.formats import QuantFormat, get_format

from .packed import PackedModule, decoded, ordinary_tensors, packed_parameter, packed_shape
from .parameter import PackedParameter

# Looking up the overload in each call costs a microsecond. `_op` is what OpOverload.__call__ calls; using it directly
# saves a Python call. `_op` is private: without it, this import fails. tests/test_modules_gradients.py measures the cost
# (test_call_costs_little_more_than_the_operator) and compares the results (test_both_operators_give_the_same).
_linear = torch.ops.isqtorch.linear.default
_linear_frozen = torch.ops.isqtorch.linear_frozen.default._op
_w8a8 = torch.ops.isqtorch.linear_w8a8.default
_w8a8_frozen = torch.ops.isqtorch.linear_w8a8_frozen.default._op
_is_compiling, _functorch_is_active = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active


class QuantLinear(PackedModule, nn.Linear):
    """A linear layer with a packed weight, uint8 `[N, row_bytes]`: y = x @ dequantize(weight)^T + bias.

    It is a subclass of nn.Linear, so code that searches for linear layers finds it. `quantize_` makes it; `from_float`
    makes it from a layer, and `from_packed` from packed bytes. The constructor makes a layer of zeros, to load a state
    dict into.

    Args:
        in_features: K, a multiple of the format's block.
        out_features: N.
        bias: whether there is a bias `[N]`, of type `dtype`.
        format: format or its name.
        device: device of the weight; "meta" allocates no memory.
        dtype: the float type of the layer: of the bias, and of `dequantize`; default: torch's default dtype.

    Attributes:
        activations: "fp8" allows rounding x to FP8, with one scale per 128 columns, where that is faster
            (`torch.ops.isqtorch.linear_w8a8`). Only for weights in format fp8. None: x is not rounded.

    Shapes:
        x `[..., K]` in f32, f16 or bf16; result `[..., N]` of the same type.

    Example:
        layer = isqtorch.QuantLinear.from_float(torch.nn.Linear(512, 64), "q4k")
        print(layer(torch.randn(2, 512)).shape, layer.bits_per_weight)  # torch.Size([2, 64]) 4.5
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
        """Make a layer from packed bytes, which are not copied.

        Args:
            packed: uint8 `[N, row_bytes]`. A parameter stays the same object.
            format: format of the bytes, or its name.
            bias: float `[N]`, or None. It is not copied either.
            dtype: the float type of the layer; default: torch's default dtype.

        Raises:
            ValueError: `packed` is not uint8 `[N, row_bytes]` of whole blocks, the shape of the bias is wrong, or the
                format is unknown.
        """
        fmt = get_format(format)
        rows, in_features = packed_shape("QuantLinear.from_packed", packed, fmt)
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
        """Quantize the weight of a linear layer. `linear` itself does not change; both layers share the bias.

        Args:
            linear: the float layer.
            format: format or its name.
            importance: float `[K]`, see `isqtorch.quantize`.
            rule: alternative rule of the quantizer, see `isqtorch.quantize`.

        Raises:
            ValueError: K does not fit the format, a weight is not finite, or format or rule is unknown.
        """
        fmt = get_format(format)
        with ordinary_tensors():
            packed = torch.ops.isqtorch.quantize(linear.weight, fmt.name, importance, rule)
        return cls.from_packed(packed, fmt, bias=linear.bias, dtype=linear.weight.dtype)

    @property
    def activations(self) -> str | None:
        """The permission to round x to FP8: "fp8", or None."""
        return self._activations

    @activations.setter
    def activations(self, value: str | None) -> None:
        if value is not None and value != get_format(self.format).activations:
            raise ValueError(
                f'QuantLinear: activations must be None, or "fp8" for a weight in fp8; got {value!r} for one in {self.format}'
            )
        self._activations = value

    def forward(self, x: Tensor) -> Tensor:
        # self.weight is slow: nn.Module looks it up in __getattr__, after an AttributeError. It takes as long as all
        # other code here. FSDP1 moves the parameters out of `_parameters`; then the slow way is needed
        # (test_weight_outside_of_the_parameters).
        own = self._parameters
        weight: Any = own["weight"] if "weight" in own else self.weight
        weight = weight.plain if type(weight) is PackedParameter else weight  # `plain_bytes`, without its call
        bias = own["bias"] if "bias" in own else self.bias
        if torch._C._is_any_autocast_enabled():
            device = x.device.type
            if device != "meta" and torch.is_autocast_enabled(device):  # autocast casts x in nn.Linear, too
                x = x.to(torch.get_autocast_dtype(device))
        compiling = _is_compiling()
        decodes = x.dtype is torch.float64  # after `.double()`; the operators have no such type
        if decodes or (not compiling and (forward_ad._current_level >= 0 or _functorch_is_active())):
            # The operator has no derivative for torch.func and forward mode; forward mode would silently use zero. Both
            # checks read private names of torch: test_every_kind_of_derivative fails if their meaning changes.
            w = decoded(weight, self.format, x.dtype)
            return nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
        # The autograd formula of `linear` is Python code, which takes longer than a small layer. `linear_frozen` has no
        # formula and is used if no gradient is recorded. Tracers must see `linear`
        # (test_tracers_see_the_operator_with_a_gradient).
        y: Tensor
        if compiling or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
            y = (_linear if self._activations is None else _w8a8)(x, weight, self.format, bias)
        else:
            y = (_linear_frozen if self._activations is None else _w8a8_frozen)(x, weight, self.format, bias)
        return y

    def reset_parameters(self) -> None:
        """Set weight and bias to zero, as the constructor does. Packed bytes cannot be initialized randomly."""
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
