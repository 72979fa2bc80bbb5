"""The weights of a checkpoint on their way into vLLM's model.

Some of vLLM's models make a token table or a head without asking plug-ins about it. Such a layer is float, so a packed
weight of the checkpoint is decoded before it gets there. Stacks of packed experts are given one expert at a time: for a
stack, the code of some models expects the axes of the float checkpoint, which are swapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from isqtorch.text import first_names, human_size

from .config import IsqVllmConfig
from .formats import OP, WAY_OUT, Formats, log

_CODES = (torch.uint8, torch.int8, torch.int32, torch.uint32)


class IsqModelLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not a dependency
    """vLLM's usual loader; it decodes the packed weights that the model has no packed layer for."""

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        weights: Iterator[tuple[str, Tensor]] = super().get_all_weights(model_config, model)
        current = get_current_vllm_config_or_none()
        config = None if current is None else current.quant_config
        if isinstance(config, IsqVllmConfig):
            return decoded(weights, config.formats, model, model_config.dtype)
        return weights


def install() -> None:
    """Put the loader in the place of vLLM's own. It is the same for models of other quantization methods.

    `register_model_loader` would warn each user of vLLM who has isqtorch installed.
    """
    for name, loader in _LOAD_FORMAT_TO_MODEL_LOADER.items():
        if loader is DefaultModelLoader:
            _LOAD_FORMAT_TO_MODEL_LOADER[name] = IsqModelLoader


def decoded(
    weights: Iterable[tuple[str, Tensor]], formats: Formats, model: nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, those in float for which the model did not ask a plug-in.

    Args:
        weights: (name, tensor) of the checkpoint.
        formats: of the model's layers, after the model was made.
        model: vLLM's model, or the share of a stage of a pipeline.
        dtype: type of the floats.
    """
    unasked = formats.unasked()
    if formats.online:
        here = [path for path, _ in unasked.values() if not is_pp_missing_parameter(f"{path}.weight", model)]
        if here:
            log.warning(
                "%s: vLLM's %s asks no plug-in about %s: they stay float.", OP, type(model).__name__, first_names(here)
            )
        for name, tensor in weights:
            _check_float(name, tensor)
            yield from _pieces(formats, name, tensor)
        return
    changed: dict[str, tuple[int, int]] = {}
    for name, tensor in weights:
        path = formats.stored_in(name.removesuffix(".weight"))
        if formats.by_expert(name) is not None:
            yield from _pieces(formats, name, tensor)
        elif path is None or tensor.dtype != torch.uint8:
            yield name, tensor
        elif path not in unasked:
            yield from _by_expert(path, tensor) if tensor.dim() == 3 and path == name else [(name, tensor)]
        elif not is_pp_missing_parameter(f"{unasked[path][0]}.weight", model):
            floats = _floats(name, tensor, unasked[path][1], dtype)
            before, after = changed.get(path, (0, 0))
            changed[path] = before + tensor.nbytes, after + floats.nbytes
            yield name, floats.transpose(1, 2) if tensor.dim() == 3 else floats
    if changed:
        before, after = (sum(sizes) for sizes in zip(*changed.values(), strict=True))
        log.warning(
            "%s: vLLM's %s asks no plug-in about %s, which the checkpoint has packed: they are decoded, and take %s instead of %s.",
            OP,
            type(model).__name__,
            first_names(list(changed)),
            human_size(after),
            human_size(before),
        )


def _check_float(name: str, tensor: Tensor) -> None:
    """ValueError for the codes of another program, which vLLM's loaders would take for weights."""
    if tensor.dim() > 1 and (tensor.dtype in _CODES or (tensor.is_floating_point() and tensor.itemsize == 1)):
        raise ValueError(
            f"{OP}: {name} has {str(tensor.dtype).removeprefix('torch.')} values, so another program has quantized this checkpoint, but "
            f"a model is packed from floats while vLLM loads it. {WAY_OUT}"
        )


def _floats(name: str, packed: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    try:
        floats: Tensor = torch.ops.isqtorch.dequantize(packed, fmt, dtype)
    except ValueError as error:
        raise ValueError(
            f"{OP}: config.json says that {name} is {fmt}, but {str(error).removeprefix('dequantize: ')}. The checkpoint is damaged, or "
            "its config.json is that of another model."
        ) from None
    return floats


def _pieces(formats: Formats, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of all experts, under the names that vLLM knows for each of them; any other tensor as it is."""
    target = formats.by_expert(name)
    if target is None:
        yield name, tensor
        return
    for number, values in enumerate(tensor):
        yield f"{target[0]}.{number}.{target[1]}", values


def _by_expert(path: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a stack `[E, N, row_bytes]`, under the names that vLLM knows for experts one by one."""
    parent, _, leaf = path.rpartition(".")
    for number, matrix in enumerate(stack):
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for name, part in zip(names, matrix.chunk(len(names)), strict=True):
            yield f"{parent}.{number}.{name}.weight", part
