"""modules_to_save: a packed layer that is trained in full gets a float copy, which is packed again when it is merged."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from isqtorch.modules import PackedModule, QuantEmbedding, QuantExperts, QuantLinear
from isqtorch.modules.convert import experts_to_float, float_weight, put_module, to_float, to_packed, weight_matrix
from isqtorch.modules.packed import ordinary_tensors

from .session import Session, session


def update(theirs: Any, wrapper: Any, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
    """`ModulesToSaveWrapper.update`: the copy that is trained has the decoded weights."""
    original = wrapper.original_module
    packed = [path for path, module in original.named_modules() if isinstance(module, PackedModule)]
    if packed and not tied_module and adapter_name not in wrapper.modules_to_save:
        wrapper.modules_to_save[adapter_name] = _decoded(original, packed)
    theirs(wrapper, adapter_name, tied_module=tied_module, **kwargs)


def _decoded(original: nn.Module, packed: list[str]) -> nn.Module:
    """A copy of a module with float layers in the place of packed ones."""
    made = copy.deepcopy(original)
    for path in packed:
        layer = made.get_submodule(path)
        if isinstance(layer, QuantExperts):
            new = experts_to_float(layer)
        else:
            assert isinstance(layer, (QuantLinear, QuantEmbedding))
            new = to_float(layer, float_weight(layer))
        if not path:
            return new
        put_module(made, path, new)
    return made


def unload(theirs: Any, wrapper: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> Any:
    """`ModulesToSaveWrapper.unload_and_optionally_merge_module`: the trained copy is packed as the module was."""
    original = wrapper.original_module
    trained = theirs(wrapper, merge, safe_merge, adapter_names)
    if trained is original or not merge:
        return trained
    with session() as running:
        for path, old in original.named_modules():
            if isinstance(old, PackedModule):
                new = _packed(trained.get_submodule(path), old, running)
                running.count += 1
                if not path:
                    return new
                put_module(trained, path, new)
    return trained


def _packed(layer: nn.Module, old: PackedModule, running: Session) -> nn.Module:
    """The packed form of a float layer, in the formats of `old`."""
    for leaf in old.packed:
        fmt = running.format_of(old, leaf)
        with ordinary_tensors():
            weight = weight_matrix(layer, leaf).detach()
            stack = weight if weight.dim() == 3 else weight[None]
            packed = torch.stack([torch.ops.isqtorch.quantize(matrix, fmt.name, None, None) for matrix in stack])
        parameter = running.parameter(cast(Tensor, old._parameters[leaf]), packed if weight.dim() == 3 else packed[0])
        layer = to_packed(layer, parameter, fmt, leaf)
    return layer.requires_grad_(False)
