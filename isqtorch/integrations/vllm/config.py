"""Decides which method vLLM uses for each of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from isqtorch.formats import get_format, mix_name
from isqtorch.integrations.record import METHOD, checked_layers, checked_version
from isqtorch.modules.packed import FLOAT_DTYPES
from isqtorch.policy.decide import decide
from isqtorch.policy.layers import LayerInfo, head_by_name
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request

from .methods import IsqEmbeddingMethod, IsqLinearMethod, IsqOnlineMethod

_OP = "isq in vLLM"
_EXPERTS = {"FusedMoE", "RoutedExperts"}  # class names of vLLM's expert layers in different versions
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
        checked_version(_OP, content.get("format_version", 1))
        self.layers: dict[str, str] | None = None
        self.request: Request | None = None
        if "layers" in content:
            self.layers = checked_layers(_OP, content["layers"])
            if content.get("activations"):
                warnings.warn(
                    f"{_OP}: activations are not rounded to FP8 in vLLM, though config.json allows it: fp8 layers multiply x as it is.",
                    stacklevel=2,
                )
        else:
            unknown = sorted(set(content) - {*_OPTIONS, "quant_method", "format_version", "isqtorch_version"})
            if unknown:
                raise ValueError(f"{_OP}: unknown option {unknown[0]!r}. Options are {', '.join(_OPTIONS)}.")
            options = {option: content[option] for option in _OPTIONS[1:] if option in content}
            if mix_name(content.get("isq")) is not None:
                raise ValueError(
                    f"{_OP}: {content['isq']!r} gives layers different formats, and vLLM asks layer by layer, without the model. Save the "
                    "model with save_pretrained and serve that, or give one format and a topology."
                )
            self.request = Request(content.get("isq"), Options(**options), _OP)

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

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers to the names of vLLM's model."""
        if self.layers is not None:
            self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, (ParallelLMHead, VocabParallelEmbedding)):
            return self._embedding(prefix)
        if isinstance(layer, LinearBase):
            return self._linear(layer, prefix)
        experts = sorted(path for path in self.layers or () if path.startswith(f"{prefix}."))
        if experts:
            raise NotImplementedError(
                f"{_OP}: {experts[0]} holds packed experts, which are not supported in vLLM yet. Save the model with "
                "IsqConfig(..., exclude='experts')."
            )
        if self.layers is None and _EXPERTS & {cls.__name__ for cls in type(layer).__mro__}:
            warnings.warn(
                f"{_OP}: the experts of {prefix} stay float, which is most of such a model: they are not packed in vLLM yet.",
                stacklevel=2,
            )
        return None

    # ---- the answers -------------------------------------------------------------------------------------------------

    def _embedding(self, prefix: str) -> Any:
        """The method of an embedding table. It stays float unless the checkpoint has it packed: vLLM cannot pack it."""
        name = (self.layers or {}).get(prefix)
        return None if name is None else IsqEmbeddingMethod(get_format(name), prefix)

    def _linear(self, layer: Any, prefix: str) -> Any:
        parts = self._parts(prefix)
        if self.layers is not None:
            formats = {self.layers.get(part) for part in parts}
            if formats == {None}:
                return UnquantizedLinearMethod()
            if len(formats) > 1:
                listed = ", ".join(f"{part}: {self.layers.get(part) or 'float'}" for part in parts)
                raise ValueError(
                    f"{_OP}: vLLM merges these layers into {prefix}, so they need one format: {listed}. Save the model with a topology "
                    "that gives them the same."
                )
            return IsqLinearMethod(get_format(str(formats.pop())), prefix)
        assert self.request is not None
        return IsqOnlineMethod(lambda shape, dtype: self._decide(parts, prefix, shape, dtype), prefix)

    def _parts(self, prefix: str) -> list[str]:
        """The layers of the checkpoint that vLLM merges into one layer: q_proj, k_proj and v_proj become qkv_proj."""
        path, _, leaf = prefix.rpartition(".")
        merged: Sequence[str] = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{path}.{part}".lstrip(".") for part in merged]

    def _decide(self, parts: list[str], prefix: str, shape: tuple[int, int], dtype: torch.dtype) -> Any:
        """The format of a layer `[N, K]`, where K is this process's part of the columns; None: it stays float."""
        assert self.request is not None
        layers = [LayerInfo(part, "linear", shape, dtype, "head" if head_by_name(part) else "") for part in parts]
        decisions = decide(layers, self.request).decisions
        formats = {decision.format.name if decision.format else None for decision in decisions}
        if len(formats) > 1:
            listed = ", ".join(f"{d.name}: {d.format.name if d.format else 'float'}" for d in decisions)
            raise ValueError(
                f"{_OP}: vLLM merges these layers into {prefix}, so they need one format: {listed}. Give them the same in the topology."
            )
        return decisions[0].format
