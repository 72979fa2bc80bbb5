"""A model of the part of vLLM that quantization plug-ins see, as its documentation and sources describe it (version 0.2x of 2026).

Layers ask the configuration for a method, let it make their weights, and load checkpoint tensors into them: cut for this
process, q, k and v below one another. `install` puts it in the place of the real package.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

METHODS: list[str] = ["awq", "fp8"]
CONFIGS: dict[str, type] = {}


class QuantizationConfig(ABC):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...
    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...
    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...
    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...
    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


def register_quantization_config(name: str) -> Callable[[type], type]:
    def register(cls: type) -> type:
        if name in METHODS:
            raise ValueError(f"{name} exists already")
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("must be a subclass of QuantizationConfig")
        METHODS.append(name)
        CONFIGS[name] = cls
        return cls

    return register


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...
    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


def set_weight_attrs(weight: Tensor, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        assert not hasattr(weight, name), name
        setattr(weight, name, value)


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **attributes})
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, layer.weight)


class LinearBase(nn.Module):
    """`outputs` below one another; one process of `ranks` holds its share of each, or of the inputs (`by_input`)."""

    def __init__(
        self,
        inputs: int,
        outputs: list[int],
        config: Any,
        prefix: str,
        *,
        by_input: bool = False,
        rank: int = 0,
        ranks: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.rank, self.ranks, self.by_input = rank, ranks, by_input
        self.sizes = outputs if by_input else [size // ranks for size in outputs]
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self,
            inputs // ranks if by_input else inputs,
            self.sizes,
            inputs,
            sum(outputs),
            dtype,
            weight_loader=self.load,
        )

    def load(self, weight: nn.Parameter, loaded: Tensor, part: int = 0) -> None:
        """One tensor of the checkpoint into its place."""
        dim = weight.input_dim if self.by_input else weight.output_dim  # type: ignore[attr-defined]
        share = weight.data
        if not self.by_input:
            share = share.narrow(dim, sum(self.sizes[:part]), self.sizes[part])
        share.copy_(loaded.narrow(dim, self.rank * share.shape[dim], share.shape[dim]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.quant_method.apply(self, x)
        return y


class VocabParallelEmbedding(nn.Module):
    def __init__(self, rows: int, columns: int, config: Any, prefix: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        padded = (rows + 63) // 64 * 64
        self.quant_method = config.get_quant_method(self, prefix) or UnquantizedLinearMethod()
        self.quant_method.create_weights(
            self, columns, [padded], columns, padded, params_dtype=dtype, weight_loader=self.load
        )

    def load(self, weight: nn.Parameter, loaded: Tensor) -> None:
        weight.data[: loaded.shape[0]].copy_(loaded)
        weight.data[loaded.shape[0] :].fill_(0)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.quant_method.embedding(self, ids)
        return rows


class ParallelLMHead(VocabParallelEmbedding):
    pass


class FusedMoE(nn.Module):
    pass


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import vllm` finds this; whatever of isqtorch has seen another is forgotten."""
    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.quantization": {
            "QUANTIZATION_METHODS": METHODS,
            "register_quantization_config": register_quantization_config,
        },
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{layers}.vocab_parallel_embedding": {
            "VocabParallelEmbedding": VocabParallelEmbedding,
            "ParallelLMHead": ParallelLMHead,
        },
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("isqtorch.integrations.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    METHODS[:] = ["awq", "fp8"]
    CONFIGS.clear()
