"""Find layers that a model uses without calling them: its code reads `self.proj.weight` directly.

    out = F.linear(x, self.out_proj.weight)                  packed bytes would be multiplied as if they were weights
    x = x.to(self.lm_head.weight.dtype)                      activations would be cast to uint8

Such layers must keep their float weight. They are found by searching the source code of the modules' classes. Examples
are the fast path of nn.TransformerEncoderLayer, the fused scans of Mamba models and T5's `wo`. Classes without source
code are not searched.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType

from torch import nn

# self.a.b[0].weight, unless the code assigns to it or reads only its device or size
_READ = re.compile(
    r"\bself((?:\.\w+|\[\d+\])+)\.weight\b(?!\s*=[^=]|\.(?:device|shape|size|ndim|dim|numel|requires_grad|is_meta)\b)"
)
# methods that only set up a model and compute nothing
_SETUP = re.compile(
    r"__\w+__|_?init_weights|reset_parameters|_?tie_\w+|_?(?:re)?set_\w+|_?resize_\w+|get_(?:in|out)put_embeddings"
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
    """Paths, relative to an instance, of the modules whose weight the methods of a class read."""
    paths = set()
    for function in _methods(cls):
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            continue
        for match in _READ.finditer(re.sub(r"#.*", "", source)):
            path = re.sub(r"\[(\d+)\]", r".\1", match[1]).lstrip(".")
            if (cls.__name__, path) not in _HARMLESS:
                paths.add(path)
    return frozenset(paths)


def _methods(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """The methods and properties of a class that mention a weight, without overridden ones and those of nn.Module."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            return
        for name, member in vars(base).items():
            if name in seen or _SETUP.fullmatch(name):
                continue
            seen.add(name)
            function = inspect.unwrap(member.fget if isinstance(member, property) and member.fget else member)
            if isinstance(function, FunctionType) and "weight" in function.__code__.co_names:
                yield function
