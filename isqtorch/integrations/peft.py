"""PEFT: LoRA on quantized models, and merging it into their packed weights.

Training needs nothing from here: `get_peft_model` takes QuantLinear for the linear layer that it is a subclass of, and its
gradient passes through. Merging does, because a packed weight has no place to add to; without `enable` PEFT's own merge stops
with an error about shapes.

    import isqtorch.integrations.peft

    isqtorch.integrations.peft.enable()
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    ...
    model = model.merge_and_unload()        # packed in the same formats, from decoded weight plus adapters
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import peft.tuners.lora.model as lora_model
import torch
from peft.tuners.lora import Embedding, Linear, LoraConfig, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor

from isqtorch.modules import PackedModule, QuantEmbedding, QuantLinear
from isqtorch.modules.packed import ordinary_tensors

_ONLY_FOR_FLOAT = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
    "mica",
)  # values of init_lora_weights, or their beginnings


def enable() -> None:
    """Let adapters made from now on, by `get_peft_model` and whatever uses it, merge into packed layers.

    Puts a case for packed layers before PEFT's last dispatcher, for the whole process. A second call changes nothing.
    """
    if not isinstance(lora_model.dispatch_default, _Dispatcher):
        lora_model.dispatch_default = _Dispatcher(lora_model.dispatch_default)


class _Dispatcher:
    """PEFT's choice of the adapter layer for a target, with packed targets first."""

    def __init__(self, default: Any) -> None:
        self.default = default

    def __call__(self, target: Any, adapter_name: str, config: LoraConfig, **options: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if options.get("parameter_name") is None and isinstance(base, (QuantLinear, QuantEmbedding)):
            kind = IsqLoraLinear if isinstance(base, QuantLinear) else IsqLoraEmbedding
            config.fan_in_fan_out = False  # packed rows are output features, also of what was a Conv1D
            options.pop("parameter_name", None)
            return kind(target, adapter_name, config=config, **options)
        return self.default(target, adapter_name, config=config, **options)


class _MergesPacked(LoraLayer):  # type: ignore[misc]  # PEFT is not typed
    """What the adapters of packed layers have in common.

    While adapters are merged, the layer's original bytes are kept: from them each merge starts, so that rounding does not
    accumulate, and `unmerge` gives them back exactly. `merge_and_unload` drops them layer by layer.
    """

    _original: tuple[Tensor, str, Tensor | None] | None = None  # bytes, format, bias: while something is merged

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **options: Any) -> Any:
        """Plain LoRA only: variants decompose or normalize the weight itself, or are not tested here."""
        asked = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)]
        base, start = self.get_base_layer(), config.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(_ONLY_FOR_FLOAT):
            asked.append(f"init_lora_weights={start!r}")
        if asked:
            raise ValueError(
                f"LoraConfig: {asked[0]} is for layers with a float weight, and this one is packed as {base.format}. Use plain LoRA, "
                "or leave the target layers in float (a topology that maps them to null)."
            )
        return super().resolve_lora_variant(config=config, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the decoded weight and pack it again in its format.

        Args:
            safe_merge: no difference here: a result that is not finite is always refused, and nothing is changed.
            adapter_names: None for all that are active.

        Raises:
            ValueError: the merged weight is not finite, the layer is sharded or was requantized since the first merge, or it has
                no bias for `lora_bias`.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self._adapters()]
        if not new:
            return
        base = self._packed()
        original, fmt, bias = self._original or (base.weight.data, base.format, _data(base))
        names = [*(name for name in self.merged_adapters if name in self._adapters()), *new]
        with ordinary_tensors():
            weight = torch.ops.isqtorch.dequantize(original, fmt, torch.float32)
            for name in names:
                weight += self.get_delta_weight(name).to(weight.device, torch.float32)
                bias = self._with_bias(name, bias)
            try:
                merged = torch.ops.isqtorch.quantize(weight, fmt, None, None)
            except ValueError as error:
                raise ValueError(
                    f"merge: adapters {', '.join(names)} give a weight that cannot be packed: {error}"
                ) from None
        if self._original is None:
            self._original = (original, fmt, _data(base))
        base.weight.data = merged
        if bias is not None:
            base.bias.data = bias
        self.merged_adapters += new

    def unmerge(self) -> None:
        """Give the layer its bytes from before the merge."""
        if self._original is None:
            super().unmerge()  # its warning
            return
        base = self._packed()
        original, _, bias = self._original
        base.weight.data = original.to(base.weight.device)
        if bias is not None:
            base.bias.data = bias.to(base.weight.device)
        self.merged_adapters.clear()
        self._original = None

    def _adapters(self) -> Any:
        raise NotImplementedError

    def _packed(self) -> Any:
        """The packed layer, if its bytes can be replaced."""
        base = self.get_base_layer()
        if not isinstance(base, PackedModule):
            raise ValueError(
                "merge: the layer was dequantized after the adapter was added. Add it again: get_peft_model."
            )
        if type(base.weight.data) is not Tensor:
            raise ValueError(
                f"merge: the layer is sharded ({type(base.weight.data).__name__}), and its blocks cannot be packed one by one. Merge on "
                "one process, before the model is distributed."
            )
        if self._original is not None and (base.format, base.weight.shape) != (
            self._original[1],
            self._original[0].shape,
        ):
            raise ValueError(
                f"unmerge: the layer was {self._original[1]} when adapters were merged and is {base.format} now. Unmerge first, then "
                "requantize."
            )
        return base

    def _with_bias(self, name: str, bias: Tensor | None) -> Tensor | None:
        if not self.lora_bias.get(name, False):
            return bias
        if bias is None:
            raise ValueError(f"merge: adapter {name} has lora_bias=True, and the layer has no bias to add it to")
        added: Tensor = self.lora_B[name].bias * self.scaling[name]
        return bias + added.to(bias.dtype)


class IsqLoraLinear(_MergesPacked, Linear):  # type: ignore[misc]
    """LoRA on a QuantLinear."""

    def _adapters(self) -> Any:
        return self.lora_A


class IsqLoraEmbedding(_MergesPacked, Embedding):  # type: ignore[misc]
    """LoRA on a QuantEmbedding."""

    def _adapters(self) -> Any:
        return self.lora_embedding_A


def _data(base: Any) -> Tensor | None:
    """The bias of a packed layer, without its history."""
    bias = getattr(base, "bias", None)
    return None if bias is None else cast(Tensor, bias.data)
