"""Subclasses of nn.Linear and nn.Embedding that compute the same as their base, or the same times a scale.

The code of a subclass may expect a float weight, so most subclasses are not quantized. The following ones are
recognized by the source of their `forward`. No library is imported for this, and if the code of a class changes, it is
no longer quantized:

    input @ self.weight.T [+ self.bias]                                 a linear layer (FalconLinear)
    super().forward(input_ids) * self.embed_scale                       a scaled table (Bart, mBART, M2M100, XGLM, ...)
    super().forward(input_ids) * self.embed_scale.to(self.weight.dtype) the same with a rounded scale (Gemma, MiniCPM3)

ESMFold's linear layer differs from nn.Linear only in its constructor; it is recognized by name. The test
tests/integrations/test_layer_families.py::test_every_subclass_is_understood_or_known_to_be_left notices new subclasses.
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
    """What the forward of a layer computes."""

    kind: Literal["linear", "embedding"]
    scale: Literal["", "exact", "rounded"] = ""  # of an embedding: none, a number, a number rounded to the rows' type


# The statements of forward -> the base class, and what forward computes
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
_PLAIN = {"transformers.models.esm.modeling_esmfold.EsmFoldLinear": Meaning("linear")}  # inherits forward
# Attributes that a class may define besides forward: they do not change what forward computes
_HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "extra_repr", "reset_parameters"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__"}
_BASE_STATE = frozenset(vars(nn.Module()))


def meaning_of(cls: type[nn.Module]) -> Meaning | None:
    """Return what a direct subclass of nn.Linear or nn.Embedding computes, or None if it is not recognized."""
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
    """Return whether the class is recognized, and the instance has no additional parameters, buffers or layers."""
    meaning = meaning_of(type(module))
    if meaning is None or module._modules:
        return False
    buffers = {"embed_scale"} if meaning.scale == "rounded" else set()
    return set(module._buffers) == buffers and set(module._parameters) <= {"weight", "bias"}


def scale_of(module: nn.Module) -> tuple[float | None, bool]:
    """Return the scale of an embedding's rows (None if there is none), and whether it is rounded to the rows' type."""
    meaning = meaning_of(type(module))
    if meaning is None or not meaning.scale:
        return None, False
    scale: Any = getattr(module, "scalar_embed_scale", None)  # the buffer may be on the meta device
    if scale is None:
        scale = getattr(module, "embed_scale")  # noqa: B009  (a float for some classes, a tensor for others)
    return (None if scale is None else float(scale)), meaning.scale == "rounded"


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that the constructor of a subclass set, except tensors: sizes, scale, options."""
    return {name: value for name, value in vars(module).items() if name not in _BASE_STATE}


def base_of(cls: type[nn.Module]) -> type[nn.Module]:
    """Return nn.Linear or nn.Embedding, the base of a recognized subclass."""
    return nn.Linear if issubclass(cls, nn.Linear) else nn.Embedding


def rebuilt(cls: type[nn.Module], attributes: dict[str, Any], like: Tensor) -> nn.Module:
    """Make a layer of a subclass, without weight and bias. The constructor is not called: its arguments are unknown."""
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    vars(new).update(attributes)
    meaning = meaning_of(cls)
    if meaning is not None and meaning.scale == "rounded":
        scale = torch.tensor(attributes["scalar_embed_scale"], device=like.device)
        new.register_buffer("embed_scale", scale, persistent=False)
    return new


def _statements(source: str) -> tuple[str, ...]:
    """Return the statements of a function, without comments, layout and docstring."""
    try:
        tree = ast.parse(textwrap.dedent(source)).body[0]
    except SyntaxError:  # a lambda out of its context
        return ()
    if not isinstance(tree, ast.FunctionDef):
        return ()
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    return tuple(ast.unparse(statement) for statement in body)
