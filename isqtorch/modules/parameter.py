"""PackedParameter: the bytes of a packed weight, which code that computes with them sees as floats.

Code outside of a layer may read its weight: `x @ table.weight.T`, `x.to(next(self.parameters()).dtype)`,
`helper(layer.weight)`. It must never take bytes for numbers. So a packed weight is a Parameter with a
`__torch_function__` of its own, which sees every call of torch with the weight among its arguments:

    moves     .to(device), detach, .data, views, cat, copy_, ...   bytes; floats if a model's code calls it
    asks      .dtype, .shape, is_floating_point(), numel(), ...    as bytes; as floats if a model's code asks
    computes  F.linear, matmul, +, [...], .t(), .float(), ...      floats, wherever it is called
    writes    add_, mul_, copy_ of floats, ...                     an error that names the layer

"A model's code" is a method of a module, or anything that a module's forward calls, but not the code of a library that
moves parameters (`_MOVERS`). The layers of isqtorch use `plain`, an ordinary tensor with the same memory, so they pay
nothing. A state dict holds ordinary tensors, too.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

_Function = Callable[..., Any]
_CALL = "_call_impl"  # of nn.Module; it is on the stack inside every forward
_MOVERS = re.compile(
    r"(torch|isqtorch|accelerate|safetensors|copyreg|copy|pickle)(\.|$)"
    r"|transformers\.(modeling_utils|core_model_loading|integrations|quantizers|initialization|trainer|distributed)(\.|$)"
    r"|diffusers\.(hooks|models\.model_loading_utils)(\.|$)"
)
"""Modules of Python that move, save and shard parameters. What they do to a weight, they do to its bytes."""

_COUNTERS = {("transformers.modeling_utils", "num_parameters")}
"""Functions of these modules that mean weights all the same."""

# Functions by name; "get x" and "set x" read and write a tensor's attribute x. These answer the same for floats:
_NEUTRAL = {f"get {name}" for name in "device requires_grad grad grad_fn layout ndim".split()}
_NEUTRAL |= {"set grad", "set requires_grad"}
_NEUTRAL |= set(
    "dim get_device requires_grad_ data_ptr share_memory_ register_hook untyped_storage storage_offset storage "
    "_typed_storage __hash__ __len__ __repr__".split()
)
_QUESTIONS = ("is_", "get is_", "get _")  # other names that begin so are neutral, too, but for those below
# These move, cut or describe bytes. Everything that is not listed computes.
_BYTES = {
    "get dtype",
    "get shape",
    "get data",
    "set data",
    "get itemsize",
    "get nbytes",
    "is_floating_point",
    "is_complex",
}
_BYTES |= set(
    "size stride numel nelement element_size is_signed is_same_size type detach detach_ clone contiguous to cpu cuda "
    "pin_memory record_stream view view_as reshape flatten as_strided narrow split chunk tensor_split unbind select "
    "index_select unsqueeze squeeze expand expand_as cat concat concatenate stack vstack copy_ set_ resize_ zero_ fill_ "
    "equal numpy tolist item new_empty new_zeros new_ones new_full new_tensor empty_like zeros_like as_subclass "
    "__getitem__ __deepcopy__ __reduce_ex__ __setstate__ __dlpack__ __dlpack_device__".split()
)
_CUTS = {"__getitem__", "select", "index_select", "unbind"}  # bytes only if one of _MOVERS calls them
_CASTS = {"to", "type", "view"}  # they compute if they are given a float type
_VIEWS = {"get data", "get T", "get mT", "detach", "view", "view_as", "t", "transpose", "permute", "reshape", "narrow"}
_VIEWS |= {"__getitem__", "select", "flatten", "squeeze", "unsqueeze", "expand", "expand_as", "as_strided"}
"""Of floats these give a view. Decoded floats are a copy, so what is written to such a view would be lost."""
_MEMORY = {"set data", "set_", "resize_"}  # after these the parameter has other memory
_OWN = {"plain", "owners"}  # attributes of a PackedParameter that others may not set, and that its views lack


class PackedParameter(nn.Parameter):
    """A packed weight, uint8 `[N, row_bytes]` or `[E, N, row_bytes]`, that a `PackedModule` holds.

    Attributes:
        plain: an ordinary tensor with the same memory.
        owners: weak references to the layers that hold the weight, which know its format, and its name there.
        path: its name in the model, for messages; "" if it is not known.
    """

    plain: Tensor
    owners: list[tuple[weakref.ref[Any], str]]
    path: str

    def __new__(cls, data: Tensor, requires_grad: bool = False, **attributes: Any) -> PackedParameter:
        """Make a parameter of bytes. Other `attributes` are kept; accelerate passes those of the parameter it replaces."""
        plain = data.plain if isinstance(data, PackedParameter) else data.detach()
        self = Tensor._make_subclass(cls, plain, False)  # bytes have no gradient
        vars(self).update({name: value for name, value in attributes.items() if name not in _OWN})
        self.plain, self.owners, self.path = plain, [], attributes.get("path", "")
        return self

    def floats(self) -> Tensor:
        """The decoded weight, in the layout and the type of the weight that the layer replaced."""
        for reference, leaf in self.owners:
            layer = reference()
            if layer is not None:
                weight: Tensor = layer.as_before(leaf)
                return weight
        raise RuntimeError(
            f"isqtorch: {self.path or 'a packed weight'} cannot be decoded: its layer is gone. Keep the layer."
        )

    def rows(self, index: Any) -> Any:
        """`floats()[index]`; only the rows that are needed are decoded, if the first index names rows."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        layer = next(filter(None, (reference() for reference, _ in self.owners)), None)
        if layer is None or layer.is_turned() or not isinstance(first, (int, slice, Tensor)) or isinstance(first, bool):
            return DecodedView.of(self.floats()[index], self)
        packed = self.plain[first]  # [..., row_bytes]
        weight = layer.decoded_rows(packed.reshape(-1, packed.shape[-1]))
        weight = weight.view(*packed.shape[:-1], weight.shape[-1])
        if rest:
            weight = weight[(*[slice(None)] * (packed.dim() - 1), *rest)]
        return DecodedView.of(weight, self)

    def belongs_to(self, layer: nn.Module, leaf: str) -> None:
        """Note a layer that holds this weight under the name `leaf`."""
        alive = [(reference, name) for reference, name in self.owners if reference() not in (None, layer)]
        self.owners = [*alive, (weakref.ref(layer), leaf)]

    @classmethod
    def __torch_function__(
        cls, func: _Function, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, _name_of(func)
        head = args[0] if args else next(iter(kwargs.values()), None)  # nn.init passes everything by name
        first = head if isinstance(head, PackedParameter) else None
        if (
            _writes(name)
            and first is not None
            and (name not in _BYTES or _has_numbers(name, (*args[1:], *kwargs.values())))
        ):
            raise _refusal(name, first.path)
        if name in ("requires_grad_", "set requires_grad") and first is not None and _wants_gradients(args, kwargs):
            raise RuntimeError(
                f"isqtorch: {first.path or 'a weight'} is packed, and packed weights have no gradients. Train adapters, leave the layer "
                "out with exclude=... (modules_to_not_convert=... of IsqConfig), or call dequantize_ first."
            )
        if name in _MEMORY and first is not None:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
                first.plain = first.detach().as_subclass(Tensor)
            return result
        if _is_ours(func) or _means_bytes(name, args, kwargs):
            result = func(*_mapped(args, _plain), **{key: _mapped(value, _plain) for key, value in kwargs.items()})
            return first if first is not None and result is first.plain else result
        if name == "__getitem__" and first is not None and first.dim() == 2:
            return first.rows(args[1])
        result = func(*_mapped(args, _floats), **{key: _mapped(value, _floats) for key, value in kwargs.items()})
        return DecodedView.of(result, first) if name in _VIEWS and first is not None else result

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedParameter:
        if id(self) not in memo:
            copied = PackedParameter(self.plain.clone(memory_format=torch.preserve_format), path=self.path)
            memo[id(self)] = copied
        found: PackedParameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles hold an ordinary parameter; the layer makes it packed again (`PackedModule.__setstate__`)."""
        return nn.Parameter(self.plain, requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedParameter({self.path + ': ' if self.path else ''}{list(self.plain.shape)} bytes)"


class DecodedView(Tensor):
    """Decoded floats in the place of a view of a weight: they can be read like any tensor, and refuse to be written to.

    A view has the marks that libraries put on the weight. By one of them transformers knows that a weight was loaded, so
    it does not write its first values to it, for example zeros to the row of the padding token.
    """

    path: str

    @classmethod
    def of(cls, result: Any, source: PackedParameter | DecodedView) -> Any:
        """`result` of a function that gives a view of `source`, if it is a tensor of floats."""
        if not isinstance(result, Tensor) or torch.compiler.is_compiling():
            return result
        view = result.as_subclass(cls)
        vars(view).update({name: value for name, value in vars(source).items() if name not in _OWN})
        return view

    @classmethod
    def __torch_function__(
        cls, func: _Function, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = _name_of(func)
        written = args[0] if args else None
        if isinstance(written, DecodedView) and _writes(name):
            raise _refusal(name, written.path)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if isinstance(written, DecodedView) and name in _VIEWS:
            return cls.of(result, written)
        return result.as_subclass(Tensor) if isinstance(result, DecodedView) else result


def name_packed(model: nn.Module) -> None:
    """Let the packed weights of a model know their names, for messages."""
    for path, parameter in model.named_parameters():
        if isinstance(parameter, PackedParameter):
            parameter.path = path


def plain_bytes(weight: Tensor) -> Tensor:
    """A packed weight as an argument of our operators: an ordinary tensor with the same memory. A shard stays as it is."""
    return weight.plain if type(weight) is PackedParameter else weight


def is_plain(tensor: object) -> bool:
    """Whether a parameter is whole and here: an ordinary or a packed one, not a shard or a wrapper of another library."""
    return type(tensor) in (nn.Parameter, PackedParameter)


# ---- what a call means -----------------------------------------------------------------------------------------------


def _name_of(func: _Function) -> str:
    name = str(getattr(func, "__name__", ""))
    if name in ("__get__", "__set__"):
        return f"{name.strip('_')} {getattr(getattr(func, '__self__', None), '__name__', '')}"
    return name


def _is_ours(func: _Function) -> bool:
    """Whether this is an operator of isqtorch, as an overload or a packet of overloads."""
    return str(getattr(func, "_qualified_op_name", getattr(func, "namespace", ""))).startswith("isqtorch")


def _writes(name: str) -> bool:
    in_place = (
        name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "share_memory_", "detach_")
    )
    return (
        in_place
        or name in ("__setitem__", "set data")
        or (name.startswith("__i") and name.endswith("__") and name != "__invert__")
    )


def _means_bytes(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call moves or describes bytes; otherwise it computes with floats."""
    internal = name.startswith("_") and not name.startswith("__")  # torch's own bookkeeping
    if name in _NEUTRAL or internal or (name.startswith(_QUESTIONS) and name not in _BYTES):
        return True
    if name not in _BYTES:
        return False
    if name in _CASTS and any(isinstance(a, torch.dtype) and a.is_floating_point for a in (*args, *kwargs.values())):
        return False
    if torch.compiler.is_dynamo_compiling():
        return False  # what Dynamo traces is a model's code; our layers use `plain`
    return not _calls_from_a_model(name in _CUTS)


def _calls_from_a_model(or_anywhere: bool) -> bool:
    """Whether a model's code calls torch; `or_anywhere`: or any code but that of libraries that move parameters."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _module_of(frame) in (__name__, "torch._tensor", "torch.overrides"):
        frame = frame.f_back
    if frame is None:
        return False
    if _MOVERS.match(_module_of(frame)):
        return (_module_of(frame), frame.f_code.co_name) in _COUNTERS
    if or_anywhere or isinstance(frame.f_locals.get("self"), nn.Module):
        return True
    while frame is not None:
        if frame.f_code.co_name == _CALL:
            return True
        frame = frame.f_back
    return False


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _wants_gradients(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))


def _has_numbers(name: str, values: tuple[Any, ...]) -> bool:
    """Whether what is written to bytes is none: a tensor of another type, or a number other than 0."""
    filled = name == "fill_" and any(isinstance(value, int) and value != 0 for value in values)
    others = any(isinstance(value, Tensor) and value.dtype != torch.uint8 for value in values)
    return filled or others or any(isinstance(value, float) for value in values)


def _refusal(name: str, path: str) -> RuntimeError:
    return RuntimeError(
        f"isqtorch: {name} would change {path or 'a weight'}, which is packed and cannot take new values. Leave the layer "
        "out with exclude=..., or call dequantize_ first."
    )


def _plain(value: PackedParameter) -> Tensor:
    return value.plain


def _floats(value: PackedParameter) -> Tensor:
    return value.floats()


def _mapped(value: Any, convert: Callable[[PackedParameter], Tensor]) -> Any:
    """Arguments with something else in the place of every packed parameter in them."""
    if isinstance(value, PackedParameter):
        return convert(value)
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, convert) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
