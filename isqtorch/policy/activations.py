"""`activations="fp8"`: linear layers in fp8 may round x to FP8 as well, where that is faster.

It is a permission, like torch's allow_tf32, and not a property of the packed bytes. `QuantLinear.activations` holds it,
and saved models record it. `torch.ops.isqtorch.linear_w8a8` decides by device and number of rows of x. It has no effect
on experts and embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

from isqtorch.formats import get_format

from .decide import Verdict
from .layers import LayerInfo
from .request import Request


def check_activations(layers: Sequence[LayerInfo], verdict: Verdict, request: Request) -> list[str]:
    """Notes for the report about the effect of `request.options.activations`.

    Raises:
        ValueError: activations are given, but no linear layer will be in fp8.
    """
    if request.options.activations is None:
        return []
    notes = activation_notes(layers, verdict)
    if not notes:
        raise ValueError(
            f'{request.op}: activations="{request.options.activations}" is for linear layers in fp8, and none will be. Use fp8, or leave '
            "activations out."
        )
    return notes


def activation_notes(layers: Sequence[LayerInfo], verdict: Verdict) -> list[str]:
    """What the permission means with these formats; an empty list if no linear layer will be in fp8."""
    kinds = [
        layer.kind
        for layer, decision in zip(layers, verdict.decisions, strict=True)
        if (fmt := decision.format or (layer.packed_as and get_format(layer.packed_as))) and fmt.activations
    ]
    rounded = kinds.count("linear")
    if not rounded:
        return []
    notes = [f'activations="fp8": {rounded} linear layers may round x to FP8; `explain` says from how many rows on']
    experts = kinds.count("experts")
    if experts:
        notes.append(
            f'activations="fp8" has no effect on experts: {experts} weights in fp8 are multiplied with x as it is'
        )
    return notes
