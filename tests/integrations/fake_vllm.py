"""A model of the part of vLLM that quantization plug-ins see, after version 0.32. `make test-vllm` has the real one.

Layers ask the configuration for a method, let it make their weights, and load checkpoint tensors into them: cut for this
process, q, k and v below one another. Some models make tables without a name, or without asking. A layer whose weights
are on the meta device becomes real when all its values are there. `install` puts it in the place of the real package.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

METHODS: list[str] = ["awq", "fp8"]
CONFIGS: dict[str, type] = {}
LOADERS: dict[str, type] = {}
DONE = "_already_called_process_weights_after_loading"


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
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("must be a subclass of QuantizationConfig")
        METHODS.append(name)
        CONFIGS[name] = cls
        return cls

    return register


class WeightsMapper:
    """Renames by prefixes; None leaves the name out."""

    def __init__(self, prefixes: dict[str, str | None]) -> None:
        self.prefixes = prefixes

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        renamed = {}
        for name, value in values.items():
            for old, new in self.prefixes.items():
                if name.startswith(old):
                    name = None if new is None else new + name[len(old) :]  # type: ignore[assignment]
                    break
            if name is not None:
                renamed[name] = value
        return renamed


# ---- methods of layers -----------------------------------------------------------------------------------------------


class QuantizeMethodBase(ABC):
    uses_meta_device = False

    @abstractmethod
    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None: ...
    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor: ...
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.weight = embed_tokens.weight
        return layer


class LinearMethodBase(QuantizeMethodBase): ...


class FusedMoEMethodBase(QuantizeMethodBase):
    def __init__(self, moe: Any) -> None:
        self.moe = moe


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


class Copies(TorchDispatchMode):
    """Counts the values that are copied, on the meta device too."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


def initialize_online_processing(layer: Any) -> None:
    """Keep what is loaded until all values of the layer are there; then make it real, load, and let the method pack it."""
    kept: list[tuple[str, tuple[Any, ...]]] = []
    total = sum(weight.numel() for weight in layer.parameters())
    counter = Copies()

    def wrap(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def load(weight: Any, value: Tensor, *shard: Any) -> None:
            if counter.numel >= total:
                return  # of an expert of another process
            kept.append((name, (value, *shard)))
            with counter:
                stock(weight, value, *shard)
            if counter.numel < total:
                return
            for each, meta in list(layer.named_parameters(recurse=False)):
                real = nn.Parameter(torch.empty_like(meta, device="cpu"), requires_grad=False)
                set_weight_attrs(real, {**vars(meta), "weight_loader": stock})
                setattr(layer, each, real)
            for each, values in kept:
                stock(getattr(layer, each), *values)
            if hasattr(layer, DONE):
                delattr(layer, DONE)
            layer.quant_method.process_weights_after_loading(layer)

        return load

    for name, weight in layer.named_parameters(recurse=False):
        weight.weight_loader = wrap(name, weight.weight_loader)


# ---- layers ----------------------------------------------------------------------------------------------------------


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
        by_name: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.ranks, self.by_input = rank, ranks, by_input
        self.sizes = outputs if by_input else [size // ranks for size in outputs]
        self.quant_method = config.get_quant_method(self, prefix)
        own = inputs // ranks if by_input else inputs
        if by_name:  # vLLM does both
            names = ("input_size_per_partition", "output_partition_sizes", "input_size", "output_size", "params_dtype")
            values = dict(zip(names, (own, self.sizes, inputs, sum(outputs), dtype), strict=True))
            self.quant_method.create_weights(layer=self, **values, weight_loader=self.weight_loader)
        else:
            self.quant_method.create_weights(
                self, own, self.sizes, inputs, sum(outputs), dtype, weight_loader=self.weight_loader
            )

    def weight_loader(self, weight: Any, loaded: Tensor, shard: Any = None) -> None:
        """One tensor of the checkpoint into its place. Without a shard, the checkpoint has the merged matrix."""
        share = weight.data
        if self.by_input:
            dim = weight.input_dim
        else:
            dim = weight.output_dim
            if shard is None and len(self.sizes) > 1:
                for i, part in enumerate(loaded.split([size * self.ranks for size in self.sizes], dim)):
                    self.weight_loader(weight, part, i)
                return
            part = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)
            share = share.narrow(dim, sum(self.sizes[:part]), self.sizes[part])
        share.copy_(loaded.narrow(dim, self.rank * share.shape[dim], share.shape[dim]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.quant_method.apply(self, x)
        return y


class VocabParallelEmbedding(nn.Module):
    """A table. Many models give it no prefix; Gemma and others give it no configuration, so it asks nobody."""

    def __init__(
        self, rows: int, columns: int, config: Any = None, prefix: str = "", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        padded = (rows + 63) // 64 * 64
        method = None if config is None else config.get_quant_method(self, prefix)
        self.quant_method = method or UnquantizedLinearMethod()
        self.quant_method.create_weights(
            self, columns, [padded], columns, padded, params_dtype=dtype, weight_loader=self.weight_loader
        )

    def weight_loader(self, weight: nn.Parameter, loaded: Tensor) -> None:
        weight.data[: loaded.shape[0]].copy_(loaded)
        weight.data[loaded.shape[0] :].fill_(0)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.quant_method.embedding(self, ids)
        return rows


class ParallelLMHead(VocabParallelEmbedding):
    def tie_weights(self, table: VocabParallelEmbedding) -> Any:
        return self.quant_method.tie_weights(self, table)


class MoEActivation(Enum):
    SILU = "silu"
    SWIGLUOAI = "swigluoai"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    UNKNOWN = "unknown"


class RoutedExperts(nn.Module):
    """Experts of `[2I, H]` and `[H, I]`. A process has the experts `here`, or with `ranks` a share of I of all."""

    def __init__(
        self,
        experts: int,
        hidden: int,
        inner: int,
        config: Any,
        prefix: str,
        *,
        here: list[int] | None = None,
        rank: int = 0,
        ranks: int = 1,
        activation: str = "silu",
        biases: bool = False,
    ) -> None:
        super().__init__()
        local = list(range(experts)) if here is None else here
        self.local, self.rank, self.ranks, self.inner = local, rank, ranks, inner // ranks
        self.activation = MoEActivation(activation)
        self.expert_map = None
        if here is not None:
            self.expert_map = torch.full((experts,), -1, dtype=torch.int32)
            self.expert_map[here] = torch.arange(len(here), dtype=torch.int32)
        self.apply_router_weight_on_input = False
        self.moe_config = SimpleNamespace(
            hidden_dim=hidden,
            intermediate_size=inner,
            intermediate_size_per_partition=self.inner,
            num_local_experts=len(local),
            is_act_and_mul=not activation.endswith("_no_mul"),
            has_bias=biases,
            in_dtype=torch.float32,
        )
        self.quant_method = config.get_quant_method(self, prefix)
        if self.quant_method is not None:
            self.quant_method.create_weights(
                layer=self,
                num_experts=len(local),
                hidden_size=hidden,
                intermediate_size_per_partition=self.inner,
                params_dtype=torch.float32,
                weight_loader=self.weight_loader,
                global_num_experts=experts,
            )

    def weight_loader(self, weight: Any, loaded: Tensor, shard: str, expert: int) -> None:
        """One matrix of one expert: "w1" is the gate, "w3" goes up, "w2" down."""
        if expert not in self.local:
            return
        own = weight.data[self.local.index(expert)]
        if shard == "w2":
            own.copy_(loaded.narrow(1, self.rank * own.shape[1], own.shape[1]) if own.dim() == 2 else loaded)
        else:
            half = own[self.inner :] if shard == "w3" and self.moe_config.is_act_and_mul else own[: self.inner]
            half.copy_(loaded.narrow(0, self.rank * self.inner, self.inner))


class GptOssRoutedExperts(RoutedExperts):
    """Experts whose gate and up are one matrix, in turns; floats of a checkpoint have their axes swapped."""

    def weight_loader(self, weight: Any, loaded: Tensor, shard: str, expert: int) -> None:
        """The share of an expert: "gpt_oss_w13" or "gpt_oss_w2", a matrix or a bias."""
        own = weight.data[self.local.index(expert)]
        if own.dim() == 2 and self.quant_method.__dict__.get("weight_dtype") != "mxfp4":
            loaded = loaded.t()
        own.copy_(loaded)


# ---- loading ---------------------------------------------------------------------------------------------------------


class DefaultModelLoader:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()


class DummyModelLoader: ...


CURRENT: list[Any] = [None]
MISSING: list[str] = []  # prefixes of the layers of other stages of the pipeline


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import vllm` finds this; whatever of isqtorch has seen another is forgotten."""
    layers, loading = "vllm.model_executor.layers", "vllm.model_executor.model_loader"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: CURRENT[0]},
        "vllm.model_executor": {},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {
            "is_pp_missing_parameter": lambda name, model: any(name.startswith(each) for each in MISSING)
        },
        loading: {"_LOAD_FORMAT_TO_MODEL_LOADER": LOADERS},
        f"{loading}.default_loader": {"DefaultModelLoader": DefaultModelLoader},
        f"{loading}.reload": {},
        f"{loading}.reload.layerwise": {"initialize_online_processing": initialize_online_processing},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.fused_moe": {"RoutedExperts": RoutedExperts, "FusedMoEMethodBase": FusedMoEMethodBase},
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
    LOADERS.update(auto=DefaultModelLoader, safetensors=DefaultModelLoader, dummy=DummyModelLoader)
    MISSING.clear()
    CURRENT[0] = None
    logging.getLogger("vllm").propagate = True
    from isqtorch.integrations.vllm import register

    register()
    register()  # vLLM calls it once in every process at least


def config_of(content: dict[str, Any] | None) -> Any:
    """The plug-in's configuration, as vLLM makes it for a model like Llama."""
    cls: Any = CONFIGS["isq"]
    config = cls() if content is None else cls.from_config(content)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config
