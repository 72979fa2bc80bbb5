"""Find layers that a model computes with without calling them: its code reads `self.proj.weight` itself.

    out = F.linear(x, self.out_proj.weight)                  the whole weight is needed as floats, in every forward
    x = x.to(self.lm_head.weight.dtype)                      only its type
    row = self.embed_tokens.weight[pad_id]                   only a row

The first kind would work on a packed layer, too, because `PackedParameter` gives floats to code that computes. But it would
decode the whole weight in every forward, so such layers keep their float weight. They are found in the source code of the
modules' classes: in the methods that `forward` can reach by name. This is a hint for speed, not what keeps results right.
Examples are the fast path of nn.TransformerEncoderLayer and the fused scans of Mamba models.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType

from torch import nn

# attributes of a weight that are answered without decoding it
_CHEAP = frozenset(
    "device dtype shape size ndim dim numel nelement requires_grad is_meta is_cuda is_floating_point".split()
)
# these reads happen only with pretraining_tp > 1, a slow emulation of tensor parallelism that is not used in practice
_HARMLESS = {("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h")}


def layers_read_directly(model: nn.Module) -> dict[int, str]:
    """{id of a module whose weight is read: name of the class that reads it}."""
    found = {}
    for module in model.modules():
        for path in _reads_of_class(type(module)):  # type: ignore[arg-type]  # classes are hashable
            try:
                found[id(module.get_submodule(path))] = type(module).__name__
            except AttributeError:
                continue  # a branch for another configuration
    return found


@lru_cache(maxsize=4096)
def _reads_of_class(cls: type[nn.Module]) -> frozenset[str]:
    """Paths, relative to an instance, of the modules whose weight the forward of a class computes with."""
    paths = set()
    for function in _reached(cls):
        if "weight" not in function.__code__.co_names:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue  # no source, or a lambda out of its context
        paths |= {path for path in _reads(tree) if (cls.__name__, path) not in _HARMLESS}
    return frozenset(paths)


def _reached(cls: type[nn.Module]) -> list[FunctionType]:
    """The methods and properties of a class that `forward` calls, directly or through others, by their names."""
    methods: dict[str, FunctionType] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            function = inspect.unwrap(member.fget if isinstance(member, property) and member.fget else member)
            if name not in methods and isinstance(function, FunctionType):
                methods[name] = function
    reached, waiting = {}, ["forward"]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in reached:
            reached[name] = methods[name]
            waiting += _names_in(methods[name])
    return list(reached.values())


def _names_in(function: FunctionType) -> list[str]:
    """Names that a function mentions, also in functions inside it."""
    names: list[str] = []
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names += code.co_names
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return names


def _reads(tree: ast.AST) -> Iterator[str]:
    """Paths of the modules whose whole weight code computes with: "out_proj" of `self.out_proj.weight`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and _only_without_ids(node.test):
            node.body = []  # a way to call the model that generation does not use
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        path = _path(node.value)
        if path and not _is_cheap(node, parents.get(node)):
            yield path


def _path(node: ast.AST) -> str:
    """ "a.0.b" of `self.a[0].b`; "" for anything else."""
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name):
            return node.attr if node.value.id == "self" else ""
        above = _path(node.value)
        return above and f"{above}.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
        above = _path(node.value)
        return above and f"{above}.{node.slice.value}"
    return ""


def _is_cheap(node: ast.AST, parent: ast.AST | None) -> bool:
    """Whether a read needs no more than a fact about the weight, or some of its rows."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _CHEAP
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in ("isinstance", "hasattr", "getattr", "type")
    if isinstance(parent, ast.Subscript) and parent.value is node:
        first = parent.slice.elts[0] if isinstance(parent.slice, ast.Tuple) and parent.slice.elts else parent.slice
        whole = isinstance(first, ast.Slice) or (isinstance(first, ast.Constant) and first.value is None)
        return not whole
    return isinstance(parent, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)


def _only_without_ids(test: ast.expr) -> bool:
    """`input_ids is None`: the branch is for callers that give embeddings instead of token ids."""
    return ast.unparse(test) == "input_ids is None"
