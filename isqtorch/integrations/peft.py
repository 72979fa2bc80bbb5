"""PEFT: LoRA on quantized models, and merging it into their packed weights.

Training needs nothing from this module: QuantLinear is a subclass of nn.Linear, so `get_peft_model` accepts it, and
gradients pass through it. Merging needs `enable`, because nothing can be added to packed bytes; without it, PEFT's own
merge fails with an error about shapes.

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
    """Let adapters that are created from now on, by `get_peft_model` for example, merge into packed layers.

    This wraps PEFT's last dispatcher, `dispatch_default`, for the whole process. A second call changes nothing. It
    breaks if PEFT renames that function; test_enable_is_idempotent_and_leaves_other_layers_alone notices.
    """
    if not isinstance(lora_model.dispatch_default, _Dispatcher):
        lora_model.dispatch_default = _Dispatcher(lora_model.dispatch_default)


class _Dispatcher:
    """Chooses the adapter layer for a target: ours for packed layers, else that of PEFT."""

    def __init__(self, default: Any) -> None:
        self.default = default

    def __call__(self, target: Any, adapter_name: str, config: LoraConfig, **options: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if options.get("parameter_name") is None and isinstance(base, (QuantLinear, QuantEmbedding)):
            kind = IsqLoraLinear if isinstance(base, QuantLinear) else IsqLoraEmbedding
            config.fan_in_fan_out = False  # rows of a packed weight are output features, also if the layer was a Conv1D
            options.pop("parameter_name", None)
            return kind(target, adapter_name, config=config, **options)
        return self.default(target, adapter_name, config=config, **options)


class _MergesPacked(LoraLayer):  # type: ignore[misc]  # PEFT is not typed
    """Base class of the adapters of packed layers.

    While adapters are merged, the original bytes of the layer are kept. Each merge starts from them, so rounding errors
    do not add up, and `unmerge` restores them exactly. `merge_and_unload` frees them layer by layer.
    """

    _original: tuple[Tensor, str, Tensor | None] | None = None  # bytes, format, bias; None if nothing is merged

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **options: Any) -> Any:
        """Allow plain LoRA only: variants decompose or normalize the float weight, or are not tested here."""
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
            safe_merge: ignored: a result that is not finite always raises, and nothing changes.
            adapter_names: the adapters to merge; None: all active ones.

        Raises:
            ValueError: the merged weight is not finite; the layer is sharded, or was requantized since the first merge;
                or `lora_bias` is set and the layer has no bias.
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
        """Restore the layer's bytes from before the merge."""
        if self._original is None:
            super().unmerge()  # warns that nothing is merged
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
        """The packed layer; ValueError unless its bytes can be replaced."""
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
    """The bias of a packed layer without its autograd history, or None."""
    bias = getattr(base, "bias", None)
    return None if bias is None else cast(Tensor, bias.data)
