"""Subclasses of nn.Linear and nn.Embedding that mean what their base means, or nearly.

A subclass has code of its own, which may expect a float weight; most are left alone. These are understood, by the source of
their `forward`, so that no library is imported and a class whose code changes is left alone again:

    input @ self.weight.T [+ self.bias]                                 a linear layer (FalconLinear)
    super().forward(input_ids) * self.embed_scale                       a scaled table (Bart, mBART, M2M100, XGLM, ...)
    super().forward(input_ids) * self.embed_scale.to(self.weight.dtype) the same, by a rounded scale (Gemma, MiniCPM3)

and by name one that differs from nn.Linear in its constructor only (ESMFold's).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Meaning:
    """What calling a layer does."""

    kind: Literal["linear", "embedding"]
    scale: Literal["", "exact", "rounded"] = ""  # of an embedding: none, a number, a number rounded to the rows' type


# The statements of forward -> the base, and what it means
_FORWARDS: dict[tuple[str, ...], tuple[type[nn.Module], Meaning]] = {
    (
        "hidden_states = input @ self.weight.T",
        "if self.bias is None:\n    return hidden_states",
        "return hidden_states + self.bias",
    ): (nn.Linear, Meaning("linear")),
    ("return super().forward(input_ids) * self.embed_scale",): (nn.Embedding, Meaning("embedding", "exact")),
    ("return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)",): (
        nn.Embedding,
        Meaning("embedding", "rounded"),
    ),
}
_PLAIN = {"transformers.models.esm.modeling_esmfold.EsmFoldLinear": Meaning("linear")}  # no forward of their own
# What else a class may define without changing what calling it does
_HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "extra_repr", "reset_parameters"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__"}
_BASE_STATE = frozenset(vars(nn.Module()))


def meaning_of(cls: type[nn.Module]) -> Meaning | None:
    """What a class directly derived from nn.Linear or nn.Embedding does, or None if that is not known."""
    return _meaning_of(cls)  # type: ignore[arg-type]  # classes are hashable


@lru_cache(maxsize=4096)
def _meaning_of(cls: type[nn.Module]) -> Meaning | None:
    if cls.__bases__ not in ((nn.Linear,), (nn.Embedding,)) or not set(vars(cls)) <= _HARMLESS | {"forward"}:
        return None
    if "forward" not in vars(cls):
        return _PLAIN.get(f"{cls.__module__}.{cls.__qualname__}")
    try:
        source = inspect.getsource(vars(cls)["forward"])
    except (OSError, TypeError):
        return None
    base, meaning = _FORWARDS.get(_statements(source), (None, None))
    return meaning if base is cls.__base__ else None


def is_understood(module: nn.Module) -> bool:
    """Whether the instance, too, is what its class says: no parameters, buffers or layers besides the known ones."""
    meaning = meaning_of(type(module))
    if meaning is None or module._modules:
        return False
    buffers = {"embed_scale"} if meaning.scale == "rounded" else set()
    return set(module._buffers) == buffers and set(module._parameters) <= {"weight", "bias"}


def scale_of(module: nn.Module) -> tuple[float | None, bool]:
    """The factor of an embedding's rows, None for none, and whether it is rounded to their type first."""
    meaning = meaning_of(type(module))
    if meaning is None or not meaning.scale:
        return None, False
    scale: Any = getattr(module, "scalar_embed_scale", None)  # the buffer may be on the meta device
    if scale is None:
        scale = getattr(module, "embed_scale")  # noqa: B009  (a float for some classes, a tensor for others)
    return (None if scale is None else float(scale)), meaning.scale == "rounded"


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What the constructor of a subclass left on `module`, besides tensors: sizes, scale, options."""
    return {name: value for name, value in vars(module).items() if name not in _BASE_STATE}


def base_of(cls: type[nn.Module]) -> type[nn.Module]:
    """nn.Linear or nn.Embedding, for an understood subclass of it."""
    return nn.Linear if issubclass(cls, nn.Linear) else nn.Embedding


def rebuilt(cls: type[nn.Module], attributes: dict[str, Any], like: Tensor) -> nn.Module:
    """A layer of a subclass without its weight and bias, made without its constructor, whose arguments are not known."""
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    vars(new).update(attributes)
    meaning = meaning_of(cls)
    if meaning is not None and meaning.scale == "rounded":
        scale = torch.tensor(attributes["scalar_embed_scale"], device=like.device)
        new.register_buffer("embed_scale", scale, persistent=False)
    return new


def _statements(source: str) -> tuple[str, ...]:
    """The statements of a function, without comments, layout and docstring."""
    try:
        tree = ast.parse(textwrap.dedent(source)).body[0]
    except SyntaxError:  # a lambda out of its context
        return ()
    if not isinstance(tree, ast.FunctionDef):
        return ()
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return tuple(ast.unparse(statement) for statement in body)
