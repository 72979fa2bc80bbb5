"""Pack the experts of a checkpoint one by one, as they are read.

A checkpoint has one or more matrices per expert (`experts.3.gate_proj.weight`, `experts.3.up_proj.weight`), the model
has one stack of all experts (`experts.gate_up_proj`). transformers would join all matrices and then quantize the stack,
so the float weights of a whole layer would be in memory at once. Rows are packed independently, so here each matrix is
packed by itself and written to its place in the packed stack.

This uses private attributes of transformers' WeightConverter. It breaks if they change; test_moe_families.py and
test_moe_loading.py notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter

from isqtorch.inplace.pack import Job, pack_weight
from isqtorch.modules import QuantExperts

from .source import AsFloat, keeps_rows

Matrix = Callable[[], "Tensor | None"]
"""Reads a matrix; returns None if it belongs to another rank."""


class Packer(Protocol):
    """The part of IsqHfQuantizer that packs experts."""

    def packs(self, model: Any, name: str) -> bool: ...

    def pack_experts(self, model: Any, name: str, sources: Sequence[Sequence[Matrix]]) -> Tensor: ...

    def pack_turned(self, model: Any, name: str, read: Matrix) -> Tensor: ...


class FloatConverter(WeightConverter):  # type: ignore[misc]  # transformers is not typed
    """A converter whose operations see a model of floats, also where a layer waits for packed bytes.

    Some operations ask the model for the type or shape of the parameter that they convert for.
    """

    __slots__ = ()

    @classmethod
    def of(cls, converter: Any) -> Any:
        """The replacement of a converter; the converter itself if it is of an unknown kind."""
        if type(converter) is not WeightConverter:
            return converter
        new = cls(
            converter._original_source_patterns.copy(),
            converter._original_target_patterns.copy(),
            operations=converter.operations,
            force_cpu=converter.force_cpu,
        )
        new.scope_prefix, new.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        return new

    def convert(self, layer_name: str, model: Any = None, **context: Any) -> dict[str, Any]:
        face = None if model is None else AsFloat(model)
        return super().convert(layer_name, model=face, **context)  # type: ignore[no-any-return]

    def copy(self, source_patterns: Any, target_patterns: Any, **options: Any) -> Any:
        """An ordinary converter, used for saving: its operations see packed tensors."""
        options.setdefault("force_cpu", self.force_cpu)
        new = WeightConverter(source_patterns, target_patterns, **options)
        new.scope_prefix, new.base_model_prefix = self.scope_prefix, self.base_model_prefix
        return new


class ExpertsConverter(FloatConverter):
    """Collects matrices like the converter that it replaces, and packs them instead of joining them."""

    __slots__ = ()

    def convert(self, layer_name: str, model: Any = None, hf_quantizer: Any = None, **context: Any) -> dict[str, Any]:
        path = layer_name.rpartition(".")[0]
        quantizer: Packer | None = hf_quantizer
        if model is None or quantizer is None or not quantizer.packs(model, layer_name):
            packs = False
        else:
            packs = isinstance(model.get_submodule(path), QuantExperts)
        if not packs:
            return super().convert(layer_name, model=model, hf_quantizer=hf_quantizer, **context)
        assert quantizer is not None, "checked above"
        sources = [[_reader(entry) for entry in self.collected_tensors.pop(key, [])] for key in self.source_patterns]
        if all(keeps_rows(operation) for operation in self.operations):
            if all(type(operation) is Concatenate for operation in self.operations):  # of stacks, as in Step 3.7
                sources = [[matrix for read in part for matrix in _matrices(read)] for part in sources]
            return {layer_name: quantizer.pack_experts(model, layer_name, sources)}
        [[read]] = sources
        return {layer_name: quantizer.pack_turned(model, layer_name, read)}


def pack_matrices(
    sources: Sequence[Sequence[Matrix]],
    shape: tuple[int, ...],
    job: Job,
    done: Callable[[Tensor, int], None],
) -> Tensor:
    """The packed stack of the matrices in `sources`.

    Args:
        sources: for each part of the rows (gate, then up), the matrices of all experts in order. Matrices of uint8 are
            packed already.
        shape: `[E, N, row_bytes]`, this rank's part.
        job: format, rule and importance. The importance covers the experts of all ranks.
        done: called with a matrix that is no longer needed, and the number of its expert.

    Raises:
        ValueError: the matrices do not form a stack of this shape, or one cannot be quantized.
    """
    experts, rows, row_bytes = shape
    fmt, importance = job.fmt, job.importance
    out: Tensor | None = None
    start = 0
    for part in sources:
        here = height = 0
        if importance is not None and importance.dim() == 2 and len(importance) != len(part):
            raise ValueError(
                f"the checkpoint has {len(part)} experts, and their importance is that of {len(importance)}"
            )
        for number, read in enumerate(part):
            matrix = read()
            if matrix is None:
                continue
            height = matrix.shape[0]
            is_packed = matrix.dtype == torch.uint8
            width = matrix.shape[-1] if is_packed else fmt.row_bytes(matrix.shape[-1])
            fits = matrix.dim() == 2 and width == row_bytes and start + height <= rows
            if not fits or here == experts:
                raise ValueError(
                    f"expert {number} is {list(matrix.shape)} in the checkpoint; it does not fit into a stack of {experts} "
                    f"{fmt.name} matrices with {rows} rows of {row_bytes} bytes"
                )
            if out is None:
                out = torch.empty(shape, dtype=torch.uint8, device=matrix.device)
            if is_packed:
                out[here, start : start + height] = matrix
                here += 1
                continue
            vector = importance[number] if importance is not None and importance.dim() == 2 else importance
            try:
                out[here, start : start + height] = pack_weight(matrix, job, vector, number)
            except ValueError as error:
                raise ValueError(f"expert {number}: {error}") from None
            job.watch.finish()  # reads the matrix, whose pages are dropped now
            done(matrix, number)
            here += 1
        if here != experts:
            raise ValueError(f"the checkpoint has {here} experts where the model has {experts}")
        start += height
    if out is None or start != rows:
        raise ValueError(f"the experts in the checkpoint have {start} rows, those of the model {rows}")
    return out


def replaced(converters: Iterable[Any]) -> list[Any]:
    """The model's converters, with an ExpertsConverter in place of each one that joins or transposes experts."""
    return [_replacement(entry) if isinstance(entry, WeightConverter) else entry for entry in converters]


def _replacement(converter: Any) -> Any:
    turns = [type(operation) for operation in converter.operations] == [Transpose]
    joins = all(keeps_rows(operation) for operation in converter.operations)
    experts = (joins or turns) and len(converter.target_patterns) == 1
    return (ExpertsConverter if experts else FloatConverter).of(converter)


def _matrices(read: Matrix) -> list[Matrix]:
    """The matrices of a stack that the checkpoint has as one tensor. A file is mapped, so these are views of its pages."""
    stack = read()
    if stack is None or stack.dim() != 3:
        return [lambda: stack]
    return [partial(stack.select, 0, number) for number in range(stack.shape[0])]


def _reader(entry: Any) -> Matrix:
    """A function that reads what the loader has collected: a future, a function, or a tensor."""
    if isinstance(entry, Tensor):
        return lambda: entry
    return entry.result if hasattr(entry, "result") else entry  # type: ignore[no-any-return]
