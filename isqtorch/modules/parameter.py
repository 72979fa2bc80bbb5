"""PackedParameter: the bytes of a packed weight, which code that computes with them sees as floats.

Much code outside of a layer reads its weight: `x @ table.weight.T`, `x.to(next(self.parameters()).dtype)`, `helper(layer.weight)`.
Bytes must never be taken for numbers there. So a packed weight is a Parameter with a `__torch_function__` of its own:

    moves bytes         .to(device), copy_, detach, untyped_storage, state_dict, sharding      outside of forwards
    computes: decoded   F.linear, matmul, +, indexing, .t(), .float(), torch.func                everywhere
    asks: as floats     .dtype, .shape, is_floating_point()                                      inside of forwards
    writes: an error    add_, mul_, copy_ of floats                                              everywhere

"Inside of a forward" means: in a method of a module, or in what one calls, and not in a library that moves parameters about. Our
own layers use `plain`, an ordinary tensor over the same bytes, so they pay nothing.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from types import FrameType

_Function = Callable[..., Any]
_CALL = "_call_impl"  # of nn.Module: on the stack inside of every forward
_MOVERS = re.compile(
    r"(torch|isqtorch|accelerate|safetensors|copyreg|copy|pickle)(\.|$)"
    r"|transformers\.(modeling_utils|core_model_loading|integrations|quantizers|initialization|trainer|distributed)(\.|$)"
)
"""Code that moves, saves and shards parameters: what it does directly, it does to bytes."""


# Functions by name; "get x" and "set x" are a tensor's attributes. What may be asked of bytes anywhere, because floats answer the same:
_NEUTRAL = {f"get {name}" for name in "device requires_grad grad grad_fn layout ndim".split()} | {
    "set grad",
    "set requires_grad",
}
_NEUTRAL |= set(
    "dim get_device requires_grad_ data_ptr __hash__ share_memory_ __len__ register_hook untyped_storage storage_offset storage "
    "_typed_storage __repr__".split()
)
_QUESTIONS = ("is_", "_is_", "get is_", "get _")  # other names that begin so are neutral, too
# What moves, cuts or looks at bytes outside of forwards. Everything that is not here computes.
_BYTES = _NEUTRAL | {"get dtype", "get shape", "get data", "set data", "get itemsize", "get nbytes"}
_BYTES |= set(
    "size stride numel nelement element_size is_floating_point is_complex is_signed type detach clone contiguous cpu cuda "
    "pin_memory view view_as reshape flatten as_strided narrow split chunk tensor_split unbind select index_select "
    "__getitem__ unsqueeze squeeze set_ resize_ zero_ numpy tolist item equal expand expand_as __deepcopy__ new_empty "
    "new_zeros new_tensor new_full new_ones as_subclass __reduce_ex__ __setstate__ copy_ to record_stream detach_ fill_ "
    "is_set_to __dlpack__ __dlpack_device__ is_same_size empty_like zeros_like cat concat concatenate stack vstack".split()
)
_CUTS = {
    "__getitem__",
    "select",
    "index_select",
    "unbind",
}  # code that is not known to move bytes means numbers by these
_FLOAT_CASTS = {"float", "half", "bfloat16", "double"}
_MAY_CAST = {"to", "type", "view"}
_REPLACES = {"set data", "set_", "resize_"}  # after these, `plain` is another tensor


def _name_of(func: _Function) -> str:
    name = str(getattr(func, "__name__", ""))
    if name in ("__get__", "__set__"):
        return f"{name.strip('_')} {getattr(getattr(func, '__self__', None), '__name__', '')}"
    return name


class PackedParameter(nn.Parameter):
    """A packed weight, uint8 `[N, row_bytes]` or `[E, N, row_bytes]`; made and owned by a `PackedModule`.

    Attributes:
        plain: an ordinary tensor over the same bytes.
        path: its name in the model, "" where that is not known.
        owners: weak references to the layers that hold it, which know the format, with its name there.
    """

    plain: Tensor
    owners: list[tuple[weakref.ref[Any], str]]
    path: str

    def __new__(cls, data: Tensor, requires_grad: bool = False, **attributes: Any) -> PackedParameter:
        """`requires_grad` is there for callers that make parameters of any class; bytes have no gradient."""
        plain = data.plain if isinstance(data, PackedParameter) else data.detach()
        self = Tensor._make_subclass(cls, plain, False)
        vars(self).update(
            {name: value for name, value in attributes.items() if name not in ("plain", "owners", "path")}
        )
        self.plain, self.owners, self.path = plain, [], ""
        return self

    @classmethod
    def __torch_function__(
        cls, func: _Function, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = getattr(func, "namespace", None) == "isqtorch" or getattr(func, "_qualified_op_name", "").startswith(
            "isqtorch::"
        )
        name = _name_of(func)
        if name in _REPLACES and isinstance(args[0], PackedParameter):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
                args[0].plain = args[0].detach().as_subclass(Tensor)
            return result
        if ours or _means_bytes(name, args, kwargs):
            result = func(*_mapped(args, _plain), **{name: _mapped(value, _plain) for name, value in kwargs.items()})
            return args[0] if args and result is getattr(args[0], "plain", None) else result
        _check_reads_only(name, args)
        return func(*_mapped(args, _floats), **{name: _mapped(value, _floats) for name, value in kwargs.items()})

    def floats(self) -> Tensor:
        """The weight as the layer computes with it, in the layout and the type that the replaced layer had."""
        for reference, leaf in self.owners:
            layer = reference()
            if layer is not None:
                weight: Tensor = layer.as_before(leaf)
                return weight
        raise RuntimeError("isqtorch: a packed weight whose layer is gone cannot be decoded. Keep the layer.")

    def belongs_to(self, layer: Any, leaf: str) -> None:
        """Note a layer that holds this weight under the name `leaf`."""
        alive = [(reference, name) for reference, name in self.owners if reference() not in (None, layer)]
        self.owners = [*alive, (weakref.ref(layer), leaf)]

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedParameter:
        if id(self) not in memo:
            memo[id(self)] = PackedParameter(self.plain.clone(memory_format=torch.preserve_format))
        copied: PackedParameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.plain, requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedParameter({list(self.plain.shape)} bytes)"


def name_packed(model: nn.Module) -> None:
    """Let the packed weights of a model know their names, for messages."""
    for path, parameter in model.named_parameters():
        if isinstance(parameter, PackedParameter):
            parameter.path = path


def plain_bytes(weight: Tensor) -> Tensor:
    """A packed weight for an operator of ours: an ordinary tensor over the same bytes. Sharded ones are as they are."""
    return weight.plain if type(weight) is PackedParameter else weight


def _means_bytes(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call handles bytes; otherwise it computes, and gets floats."""
    if name in _NEUTRAL or (name.startswith(_QUESTIONS) and name not in _BYTES):
        return True
    if name in _FLOAT_CASTS or name not in _BYTES:
        return False
    if name in _MAY_CAST and any(isinstance(a, torch.dtype) and a.is_floating_point for a in (*args, *kwargs.values())):
        return False
    return torch.compiler.is_compiling() or not _means_numbers(name in _CUTS)


def _means_numbers(wherever: bool) -> bool:
    """Whether the code that asks is a model's: a method of a module, or called by one. `wherever`: or any that is no mover."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _package(frame) in (__name__, "torch._tensor", "torch.overrides"):
        frame = frame.f_back
    if frame is None or _MOVERS.match(_package(frame)):
        return False
    if wherever or isinstance(frame.f_locals.get("self"), nn.Module):
        return True
    while frame is not None:
        if frame.f_code.co_name == _CALL:
            return True
        frame = frame.f_back
    return False


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _check_reads_only(name: str, args: tuple[Any, ...]) -> None:
    """RuntimeError where a packed weight would be written to in place."""
    first = args[0] if args else None
    if isinstance(first, PackedParameter) and (
        (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    ):
        raise RuntimeError(
            f"isqtorch: {name} would change {first.path or 'a weight'}, which is packed and cannot take new values. Leave "
            "the layer out with exclude=..., or call dequantize_ first."
        )


def _plain(value: PackedParameter) -> Tensor:
    return value.plain


def _floats(value: PackedParameter) -> Tensor:
    return value.floats()


def _mapped(value: Any, convert: Callable[[PackedParameter], Tensor]) -> Any:
    """Arguments with something else for every packed parameter in them."""
    if isinstance(value, PackedParameter):
        return convert(value)
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, convert) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
