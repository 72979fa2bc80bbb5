"""The permission of linear layers to round their inputs to FP8 (`activations="fp8"`), on live modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from isqtorch.formats import get_format

from .linear import QuantLinear


def permit(modules: Iterable[nn.Module], activations: str | None) -> None:
    """Set the permission of every linear layer in fp8 among `modules`."""
    for module in modules:
        if isinstance(module, QuantLinear) and get_format(module.format).activations:
            module.activations = activations


def recorded_activations(model: nn.Module) -> str | list[str] | None:
    """The permission for a model's configuration: "fp8", or the layers that have it if not all in fp8 do; None: none has."""
    layers = {
        name: module.activations
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLinear) and get_format(module.format).activations
    }
    permitted = [name for name, activations in layers.items() if activations is not None]
    if not permitted:
        return None
    return layers[permitted[0]] if len(permitted) == len(layers) else permitted
