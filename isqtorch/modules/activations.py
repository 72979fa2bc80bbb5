"""The permission of linear layers to round their inputs to FP8 (`activations="fp8"`): set it, and read it back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from isqtorch.formats import get_format

from .linear import QuantLinear


def permit(modules: Iterable[nn.Module], activations: str | None) -> None:
    """Set the permission of every linear layer whose format is fp8."""
    for module in modules:
        if isinstance(module, QuantLinear) and get_format(module.format).activations:
            module.activations = activations


def recorded_activations(model: nn.Module) -> str | list[str] | None:
    """Return the permission for a model's configuration.

    Returns:
        "fp8" if all layers in format fp8 have the permission; the names of those that have it if only some do; None if
        no layer has it.
    """
    layers = {
        name: module.activations
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLinear) and get_format(module.format).activations
    }
    permitted = [name for name, activations in layers.items() if activations is not None]
    if not permitted:
        return None
    return layers[permitted[0]] if len(permitted) == len(layers) else permitted
