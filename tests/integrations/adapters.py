"""Adapters of PEFT on small models, for the tests of isqtorch.integrations.peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from models import tiny_llama
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from isqtorch.inplace.quantize import quantize_

IDS = torch.arange(24).view(2, 12) % 60
WRAPPED = {
    BaseTuner: ("inject_adapter", "merge_adapter", "merge_and_unload", "unload"),
    ModulesToSaveWrapper: ("update", "unload_and_optionally_merge_module"),
}
"""What `enable` replaces."""


def quantized(fmt: str = "q4k", *, layers: int = 1) -> Any:
    model = tiny_llama(layers=layers, dtype=torch.float32)
    quantize_(model, fmt)
    return model


def with_lora(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **options})
    return peft.get_peft_model(model, config)


def shake(model: Any, size: float = 0.05) -> None:
    """Adapters that do something: B starts as zeros."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=size)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def silent(action: Callable[[], Any]) -> Any:
    """The result; a warning about the merge fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="merge:")
        return action()


def warned(action: Callable[[], Any]) -> tuple[Any, str]:
    """The result, and the one warning about the merge."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    messages = [str(w.message) for w in caught if str(w.message).startswith("merge:")]
    assert len(messages) == 1, messages
    return result, messages[0]


def tuned(model: Any, config: Any, size: float = 0.02) -> Any:
    """A model with an adapter that does something, the same for the same configuration."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model, copy.deepcopy(config))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * size)
    return model


def moved(source: Any, target: Any) -> Any:
    """`target` with the adapters of `source`. PEFT rounds new ones to the type of a float layer, so they would differ."""
    values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, own in [*target.named_parameters(), *target.named_buffers()]:
        if own.is_floating_point():
            own.data.copy_(values[name].data)
            values[name].data = values[name].data.to(own.dtype)
    return target


def weight_in(folder: Path, layer: str) -> Tensor:
    return load_file(folder / "model.safetensors")[f"{layer}.weight"].float()
