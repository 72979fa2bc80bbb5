"""Decides which method vLLM uses for each of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from isqtorch.integrations.record import METHOD, checked_layers, checked_version
from isqtorch.modules.packed import FLOAT_DTYPES
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request

from .experts import IsqExpertsMethod
from .formats import OP, WAY_OUT, Formats
from .linear import IsqLinearMethod
from .tables import IsqHeadMethod, IsqTableMethod

_WHOLE = "GptOssRoutedExperts"  # experts that vLLM loads one by one, each with gate and up in one matrix
_OPTIONS = ("isq", "topology", "organization", "include", "exclude", "fallback")


@register_quantization_config(METHOD)
class IsqVllmConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not a dependency
    """The "quantization_config" of a model's config.json, or of vLLM's --hf-overrides.

    With "layers", which `save_pretrained` writes, the checkpoint holds packed weights, and only that entry decides.
    Without it, weights are packed while they are loaded, by the options of `isqtorch.quantize_`; the default is 4 bits.
    """

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        super().__init__()
        content = {"isq": 4} if content is None else dict(content)
        checked_version(OP, content.get("format_version", 1))
        if "layers" in content:
            self.formats = Formats(checked_layers(OP, content["layers"]), None)
            if content.get("activations"):
                warnings.warn(
                    f"{OP}: activations are not rounded to FP8 in vLLM, though config.json allows it: fp8 layers multiply x as it is.",
                    stacklevel=2,
                )
            return
        if {"bits", "group_size"} <= set(content):
            raise ValueError(f"{OP}: MLX or another program has quantized this checkpoint. {WAY_OUT}")
        unknown = sorted(set(content) - {*_OPTIONS, "quant_method", "format_version", "isqtorch_version"})
        if unknown:
            raise ValueError(f"{OP}: unknown option {unknown[0]!r}. Options are {', '.join(_OPTIONS)}.")
        options = {option: content[option] for option in _OPTIONS[1:] if option in content}
        self.formats = Formats(None, Request(content.get("isq"), Options(**options), OP))

    # ---- what vLLM asks ----------------------------------------------------------------------------------------------

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(FLOAT_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # any GPU: without a kernel the reference runs

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IsqVllmConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called with the model's configuration, before there is a model."""
        if hf_config is not None:
            self.formats.resolve(hf_config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers to the names of vLLM's model."""
        self.formats.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, VocabParallelEmbedding):
            is_head = isinstance(layer, ParallelLMHead)
            path = self.formats.table(prefix, is_head)
            if self.formats.is_float([path]):
                return None
            return (IsqHeadMethod if is_head else IsqTableMethod)(self.formats, [path], prefix)
        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            return (
                UnquantizedLinearMethod()
                if self.formats.is_float(parts)
                else IsqLinearMethod(self.formats, parts, prefix)
            )
        if isinstance(layer, RoutedExperts):
            paths = self.formats.experts(prefix, getattr(layer.moe_config, "is_act_and_mul", True))
            if not self.formats.are_packed(prefix, paths, layer.moe_config):
                return None
            whole = any(each.__name__ == _WHOLE for each in type(layer).__mro__)
            if whole:
                self.formats.whole.update(paths)
            return IsqExpertsMethod(layer.moe_config, self.formats, paths, prefix, whole)
        return None

    def _parts(self, prefix: str) -> list[str]:
        """The layers of the checkpoint that vLLM merges into one layer: q_proj, k_proj and v_proj become qkv_proj."""
        path, _, leaf = prefix.rpartition(".")
        merged: Sequence[str] = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{path}.{part}".lstrip(".") for part in merged]
