"""Packing the experts of a checkpoint one by one, as they are read.

Checkpoints have a matrix per expert, or several (`experts.3.gate_proj.weight`, `experts.3.up_proj.weight`); the model has one
stack (`experts.gate_up_proj`). transformers collects the matrices, joins them, and would quantize the result: the float
weights of a whole layer at once. Rows are packed independently of each other, so here every matrix goes straight to its
place in the packed stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from isqtorch.inplace.pack import Job, pack_weight
from isqtorch.modules import QuantExperts

Matrix = Callable[[], "Tensor | None"]
"""Reads a matrix; None for one that belongs to another rank."""


class Packer(Protocol):
    """What packs the experts: the quantizer of this load."""

    def param_needs_quantization(self, model: Any, param_name: str) -> bool: ...

    def pack_experts(self, model: Any, name: str, sources: Sequence[Sequence[Matrix]]) -> Tensor: ...

    def pack_turned(self, model: Any, name: str, read: Matrix) -> Tensor: ...


class ExpertsConverter(WeightConverter):  # type: ignore[misc]  # transformers is not typed
    """Collects matrices like the converter it replaces, and packs them where that would join them."""

    __slots__ = ()

    @classmethod
    def of(cls, converter: Any) -> Any:
        """The converter to use instead of one of the model's; itself where there is nothing to gain."""
        joins = all(_joins(operation) for operation in converter.operations)
        turns = [type(operation) for operation in converter.operations] == [Transpose]
        if type(converter) is not WeightConverter or not (joins or turns) or len(converter.target_patterns) != 1:
            return converter
        new = cls(
            converter._original_source_patterns.copy(),
            converter._original_target_patterns.copy(),
            operations=converter.operations,
            force_cpu=converter.force_cpu,
        )
        new.scope_prefix, new.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        return new

    def convert(self, layer_name: str, model: Any = None, hf_quantizer: Any = None, **context: Any) -> dict[str, Any]:
        path = layer_name.rpartition(".")[0]
        quantizer: Packer | None = hf_quantizer
        if model is None or quantizer is None or not quantizer.param_needs_quantization(model, layer_name):
            packs = False
        else:
            packs = isinstance(model.get_submodule(path), QuantExperts)
        if not packs:
            return super().convert(layer_name, model=model, hf_quantizer=hf_quantizer, **context)  # type: ignore[no-any-return]
        assert quantizer is not None, "checked above"
        sources = [[_reader(entry) for entry in self.collected_tensors.pop(key, [])] for key in self.source_patterns]
        if all(_joins(operation) for operation in self.operations):
            return {layer_name: quantizer.pack_experts(model, layer_name, sources)}
        [[read]] = sources
        return {layer_name: quantizer.pack_turned(model, layer_name, read)}

    def copy(self, source_patterns: Any, target_patterns: Any, **options: Any) -> Any:
        """For saving: packed matrices are split by the ordinary operations."""
        options.setdefault("force_cpu", self.force_cpu)
        new = WeightConverter(source_patterns, target_patterns, **options)
        new.scope_prefix, new.base_model_prefix = self.scope_prefix, self.base_model_prefix
        return new


def pack_matrices(
    sources: Sequence[Sequence[Matrix]],
    shape: tuple[int, ...],
    job: Job,
    done: Callable[[Tensor, int], None],
) -> Tensor:
    """The packed stack of the matrices in `sources`.

    Args:
        sources: for each part of a matrix (gate, then up) the matrices of all experts in order; they follow each other along
            the rows.
        shape: `[E, N, row_bytes]`, this rank's part.
        job: format, rule and importance, the latter for the experts of all ranks.
        done: called with a matrix that is not needed any more, and the number of its expert.

    Raises:
        ValueError: the matrices do not make up a stack of this shape, or one cannot be quantized.
    """
    experts, rows, row_bytes = shape
    fmt, importance = job.fmt, job.importance
    out: Tensor | None = None
    start = 0
    for part in sources:
        here = height = 0
        for number, read in enumerate(part):
            matrix = read()
            if matrix is None:
                continue
            height = matrix.shape[0]
            fits = matrix.dim() == 2 and fmt.row_bytes(matrix.shape[-1]) == row_bytes and start + height <= rows
            if not fits or here == experts:
                raise ValueError(
                    f"expert {number} is {list(matrix.shape)} in the checkpoint; it does not fit into a stack of {experts} "
                    f"{fmt.name} matrices with {rows} rows of {row_bytes} bytes"
                )
            if out is None:
                out = torch.empty(shape, dtype=torch.uint8, device=matrix.device)
            vector = importance[number] if importance is not None and importance.dim() == 2 else importance
            try:
                out[here, start : start + height] = pack_weight(matrix, job, vector)
            except ValueError as error:
                raise ValueError(f"expert {number}: {error}") from None
            done(matrix, number)
            here += 1
        if here != experts:
            raise ValueError(f"the checkpoint has {here} experts where the model has {experts}")
        start += height
    if out is None or start != rows:
        raise ValueError(f"the experts in the checkpoint have {start} rows, those of the model {rows}")
    return out


def replaced(converters: Iterable[Any]) -> list[Any]:
    """The model's converters, with ours in the place of those that join experts."""
    return [ExpertsConverter.of(entry) if isinstance(entry, WeightConverter) else entry for entry in converters]


def _joins(operation: Any) -> bool:
    """Whether an operation puts matrices into a stack, or follows with more of their rows."""
    if type(operation) is MergeModulelist:
        return bool(operation.dim == 0)
    return type(operation) is Concatenate and operation.dim == 1


def _reader(entry: Any) -> Matrix:
    """What the loader has collected: a future, a function, or a tensor."""
    if isinstance(entry, Tensor):
        return lambda: entry
    return entry.result if hasattr(entry, "result") else entry  # type: ignore[no-any-return]
