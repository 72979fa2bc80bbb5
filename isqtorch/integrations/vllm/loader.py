"""The weights of a checkpoint on their way into vLLM's model.

Some of vLLM's models make a token table or a head without asking plug-ins about it. Such a layer is float, so a packed
weight of the checkpoint is decoded before it gets there.
"""

from __future__ import annotations

import re
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
from .formats import OP, Formats, log

_EXPERT = re.compile(r"^(.+\.experts)\.\d+\.(?:(gate_proj|up_proj|w1|w3)|(down_proj|w2))$")


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
        yield from weights
        return
    changed: dict[str, tuple[int, int]] = {}
    for name, tensor in weights:
        path = name.removesuffix(".weight")
        numbered = _EXPERT.match(path)
        if numbered is not None and path not in unasked:
            leaf = (
                "down_proj"
                if numbered[3]
                else "gate_up_proj"
                if f"{numbered[1]}.gate_up_proj" in unasked
                else "up_proj"
            )
            path = f"{numbered[1]}.{leaf}"
        if path in unasked and tensor.dtype == torch.uint8:
            own, fmt = unasked[path]
            if is_pp_missing_parameter(f"{own}.weight", model):
                continue
            packed, tensor = tensor.nbytes, torch.ops.isqtorch.dequantize(tensor, fmt, dtype)
            before, after = changed.get(path, (0, 0))
            changed[path] = before + packed, after + tensor.nbytes
        yield name, tensor
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
