"""Read a transformers checkpoint again, with all conversions of names and tensors that loading applies.

The conversions are those of the loader: keys are renamed, prefixes added, experts joined into stacks, weights split or
transposed. Here they run for one parameter at a time. This follows the code of transformers' loader and breaks if it
changes; test_transformers_requantize.py notices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from isqtorch.formats import QuantFormat
from isqtorch.inplace.source import TensorFiles
from isqtorch.modules import PackedModule
from isqtorch.modules.convert import float_shape, matrices, upright


@dataclass
class Group:
    """Tensors of the checkpoint that are converted together into one or more parameters."""

    converter: WeightConverter | None  # None: the tensor is only renamed
    collected: list[tuple[str, str]] = field(default_factory=list)  # (pattern that matched, name in the files)


class ConvertedSource(TensorFiles):
    """A checkpoint as transformers would load it into `model`."""

    def __init__(self, model: Any, files: Sequence[str], conversions: Sequence[Any]) -> None:
        super().__init__(files)
        self._model = AsFloat(model)
        self._groups, self._first = grouped(model, self.tensors, conversions)

    def read(self, name: str) -> Tensor | None:
        first = self._first.get(name)
        if first is None:
            return None
        group = self._groups[first]
        if group.converter is None:
            return self._laid_out(name, group.collected[-1][1])
        return self._converted(name, self.tensor)

    def packed(self, name: str, fmt: QuantFormat) -> Tensor | None:
        if fmt not in self.exact(name):
            return None
        group = self._groups[self._first[name]]
        if group.converter is None:
            return self.blocks(group.collected[-1][1], fmt)
        return self._converted(name, lambda key: self.blocks(key, fmt))

    def _parts(self, name: str) -> list[str]:
        group = self._groups.get(self._first.get(name, ""))
        if group is None:
            return []
        if group.converter is None:
            return [group.collected[-1][1]]
        return [key for _, key in group.collected] if is_joined(group.converter) else []

    def _converted(self, name: str, read: Callable[[str], Tensor]) -> Tensor | None:
        """A parameter that the loader makes of several tensors, of floats or of packed rows."""
        first = self._first[name]
        group = self._groups[first]
        converter = copy.deepcopy(group.converter)
        assert converter is not None, "it is only renamed"
        for pattern, key in group.collected:
            converter.add_tensor(first, key, pattern, partial(read, key))
        try:
            converted = converter.convert(first, model=self._model, config=self._model.config)
        except (
            RuntimeError,
            IndexError,
            KeyError,
            AttributeError,
            TypeError,
        ) as error:  # raised for shapes that the conversion does not expect
            raise ValueError(
                f"requantize_: {self.where}: {name} cannot be converted as it was: {error}. Exclude the layer, or give source='stored' "
                "to start from the quantized weights."
            ) from error
        found = converted.get(name)
        tensor: Tensor | None = found[0] if isinstance(found, list) else found
        return tensor

    def _laid_out(self, name: str, key: str) -> Tensor:
        """A tensor in the layout of the parameter; decoded weights have the output features first."""
        tensor = self.tensor(key)
        weight = None if self.quantized is None else self.quantized.weights.get(key)
        path, _, leaf = name.rpartition(".")
        if weight is not None and weight.oriented and is_turned(self._model.get_submodule(path), leaf):
            return tensor.transpose(-2, -1)
        return tensor

    def _plain(self, name: str) -> str | None:
        group = self._groups.get(name)
        return None if group is None or group.converter is not None else group.collected[-1][1]


def grouped(model: Any, keys: Iterable[str], conversions: Sequence[Any]) -> tuple[dict[str, Group], dict[str, str]]:
    """How the loader joins the tensors of a checkpoint to parameters.

    Args:
        model: the model.
        keys: the names in the checkpoint.
        conversions: the loader's conversions for this model.

    Returns:
        {name of the first parameter of a group: the group}, and {name of a parameter: the first of its group}.
    """
    groups: dict[str, Group] = {}
    first: dict[str, str] = {}
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # as in the loader: a key of the model is not renamed
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        converter = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(name, Group(converter))
        group.collected.append((key if pattern is None else pattern, key))
        targets = [""] if converter is None else converter.target_patterns
        for target in targets:
            first[name.replace(targets[0], target, 1)] = name
    return groups, first


def is_turned(module: Any, leaf: str = "weight") -> bool:
    """Whether a layer stores its own weight with the output features last."""
    if isinstance(module, PackedModule):
        return module.is_turned()
    parameter = module._parameters.get(leaf)
    if leaf not in matrices(module) or parameter is None:
        return False
    probe = torch.empty(tuple(range(1, parameter.dim() + 1)), device="meta")
    return upright(module, probe).shape != probe.shape


def is_joined(converter: Any) -> bool:
    """Whether a converter of the loader only joins matrices, so that the rows of each stay as they are."""
    return len(converter.target_patterns) == 1 and all(map(keeps_rows, converter.operations))


def keeps_rows(operation: Any) -> bool:
    """Whether an operation only stacks matrices, or only concatenates them along the rows."""
    if type(operation) is MergeModulelist:
        return bool(operation.dim == 0)
    return type(operation) is Concatenate and operation.dim == 1


class AsFloat:
    """Stands in for the model in conversions that ask for its parameters: gives types and shapes of the float weights.

    Attributes:
        real: the model.
    """

    def __init__(self, model: Any) -> None:
        self.real = model

    def get_parameter(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module = self.real.get_submodule(path)
        if isinstance(module, PackedModule) and leaf in module.packed:
            return torch.empty(float_shape(module, leaf), dtype=module.dtype, device="meta")
        parameter: Tensor = self.real.get_parameter(name)
        return parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)
