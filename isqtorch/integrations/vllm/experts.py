"""How vLLM's mixtures of experts hold and use packed weights.

vLLM keeps the experts of a layer as `w13_weight` `[E, 2I, H]`, or `[E, I, H]` without a gate, and `w2_weight`
`[E, H, I]`. Its loader copies packed rows as they are. With expert parallelism a process has some of the experts, with
tensor parallelism a share of I of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from isqtorch.formats import QuantFormat

from .activations import NAMES, Settings, activated
from .formats import OP, Formats, Layer
from .linear import DONE
from .packing import packed


class IsqExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM is not a dependency
    """The experts of a layer. Their weights are packed in the checkpoint, or once they are loaded."""

    def __init__(self, moe: Any, formats: Formats, paths: tuple[str, str], prefix: str, whole: bool = False) -> None:
        """Args:
        moe: vLLM's configuration of the layer.
        formats: of the model's layers.
        paths: the two stacks of experts in the checkpoint: what goes up, and what goes down.
        prefix: vLLM's name of the layer, for messages.
        whole: whether vLLM loads gate and up of an expert as one matrix, as for gpt-oss.
        """
        super().__init__(moe)
        self.formats, self.paths, self.prefix = formats, paths, prefix
        self.uses_meta_device = formats.online
        if whole and not formats.online:
            self.weight_dtype = "mxfp4"  # vLLM's loader then copies rows as they are; else it would transpose them
        self.gated = getattr(moe, "is_act_and_mul", True)
        self.has_bias = getattr(moe, "has_bias", False)
        self.up: QuantFormat
        self.down: QuantFormat

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        rows = (2 if self.gated else 1) * inner
        all_inner = getattr(self.moe, "intermediate_size", inner)
        up, down = (num_experts, rows, hidden_size), (num_experts, hidden_size, inner)
        up_format = self.formats.of(Layer(self.paths[0], "experts", up, hidden_size, params_dtype))
        down_format = self.formats.of(Layer(self.paths[1], "experts", down, all_inner, params_dtype))
        assert up_format and down_format, f"{self.prefix}: these experts are float, which `are_packed` says"
        self.up, self.down = up_format, down_format
        for name, fmt, shape in (
            ("w13", self.up, up),
            ("w2", self.down, down),
        ):
            if self.formats.online:
                empty = torch.empty(*shape, dtype=params_dtype, device="meta")
            else:
                empty = torch.empty(*shape[:-1], fmt.row_bytes(shape[-1]), dtype=torch.uint8)
            _register(layer, f"{name}_weight", empty, extra_weight_attrs)
            if self.has_bias:
                bias = torch.zeros(shape[:-1], dtype=params_dtype, device=empty.device)
                _register(layer, f"{name}_bias", bias, extra_weight_attrs)
        if self.formats.online:
            initialize_online_processing(layer)  # vLLM makes the weights real when all their values are there

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, DONE, False):
            return
        setattr(layer, DONE, True)
        if not self.formats.online:
            return
        for name, fmt, path in (
            ("w13_weight", self.up, self.paths[0]),
            ("w2_weight", self.down, self.paths[1]),
        ):
            weight = getattr(layer, name).data
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(packed(weight, fmt, path), requires_grad=False))

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None  # for vLLM's own kernels, which are not used

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The weighted sum of the experts' results: x `[T, H]`, weights and ids `[T, S]` -> `[T, H]`."""
        ids = _local(layer, topk_ids.to(torch.int64))
        weights = topk_weights.unsqueeze(-1)  # [T, S, 1]
        on_input = getattr(layer, "apply_router_weight_on_input", False)
        rows = (x.unsqueeze(1) * weights).to(x.dtype) if on_input else x
        up = self._multiply(layer, "w13", rows, self.up, ids)  # [T, S, 2I]
        hidden = self._activated(layer, up.flatten(0, 1)).view(*ids.shape, -1)
        y = self._multiply(layer, "w2", hidden, self.down, ids)  # [T, S, H]
        return (y if on_input else y * weights).sum(1).to(x.dtype)

    def _multiply(self, layer: Any, name: str, x: Tensor, fmt: QuantFormat, ids: Tensor) -> Tensor:
        bias = getattr(layer, f"{name}_bias") if self.has_bias else None
        y: Tensor = torch.ops.isqtorch.experts_linear(x, getattr(layer, f"{name}_weight"), fmt.name, ids, bias)
        return y

    def _activated(self, layer: Any, x: Tensor) -> Tensor:
        activation = getattr(layer, "activation", "silu")
        name = getattr(activation, "value", activation)
        if name not in NAMES:
            raise NotImplementedError(
                f"{OP}: the experts of {self.prefix} have the activation {name!r}; those that exist are {', '.join(NAMES)}. Save the "
                "model with IsqConfig(..., exclude='experts')."
            )
        return activated(name, x, _settings(layer, self.moe))


def _register(layer: Any, name: str, empty: Tensor, attributes: dict[str, Any]) -> None:
    weight = nn.Parameter(empty, requires_grad=False)
    set_weight_attrs(weight, attributes)
    layer.register_parameter(name, weight)


def _settings(layer: Any, moe: Any) -> Settings:
    """The numbers of the activation; vLLM has them in the layer or in its configuration."""

    def found(name: str) -> Any:
        own = getattr(layer, name, None)
        return getattr(moe, name, None) if own is None else own

    alpha, beta = found("swiglu_alpha"), found("swiglu_beta")
    return Settings(
        limit=found("swiglu_limit"),
        alpha=1.0 if alpha is None else alpha,
        beta=0.0 if beta is None else beta,
        situ_beta=found("activation_situ_beta"),
        situ_linear_beta=found("activation_situ_linear_beta"),
    )


def _local(layer: Any, ids: Tensor) -> Tensor:
    """The numbers of the experts within this process; E, for the operator, where another process has the expert."""
    numbers = getattr(layer, "expert_map", None)
    if numbers is None:
        return ids
    local = numbers[ids].to(torch.int64)
    return torch.where(local < 0, layer.w13_weight.shape[0], local)
