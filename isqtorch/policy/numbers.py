"""A number of bits as a format: what it means for one layer, and for the embeddings and output heads of a model.

A format that is named is promoted as in llama.cpp, whatever that costs. A number says how large the model may become,
and in a small model the embeddings are a fifth to two thirds of it. They get more bits only as far as the average of
the model stays near the number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from isqtorch.formats import SLACK, QuantFormat, get_format, resolve_format

from .layers import LayerInfo

MOST_ADDED = 0.3
"""Bits per weight that promotion may add to the average of a model, if a number of bits was asked for.

A model of 7 billion weights stays below it with the promotion that named formats get.
"""
_NUMBERS = (8, 6, 5, 4, 3)


def share_of_tables(layers: Sequence[LayerInfo]) -> float:
    """Return the part of all weights that is in embeddings and output heads.

    It is 0 if there are no other layers: vLLM asks for layers one by one, and then nothing is known about the model.
    """
    sizes = {layer.holder: layer.numel for layer in layers}
    tables = {layer.holder for layer in layers if layer.role}
    if len(tables) == len(sizes):
        return 0.0
    return sum(sizes[name] for name in tables) / max(1, sum(sizes.values()))


def departure(bits: int, fmt: QuantFormat, device: str | torch.device, columns: int) -> str:
    """Say why a number of bits does not mean its usual format for this layer; "" if it does."""
    usual = resolve_format(bits, device)
    if fmt.name == usual.name:
        return ""
    return f"{columns} columns are not a multiple of {usual.block}: {fmt.name} for {bits} bits"


def is_met(bits: int, fmt: QuantFormat, device: str | torch.device) -> bool:
    """Whether a format has about this number of bits: it is the usual one, or its scales and offsets add little."""
    return fmt.name == resolve_format(bits, device).name or fmt.bits_per_weight <= bits + SLACK


def promotion(fmt: QuantFormat, device: str | torch.device, columns: int, share: float) -> QuantFormat:
    """Return the format of an embedding or output head in a model that was asked to have the bits of `fmt`.

    Args:
        fmt: the format that the number of bits means for this layer.
        device: device of the layer.
        columns: columns of the layer.
        share: part of the model's weights that is in embeddings and output heads.
    """
    most = get_format(fmt.promoted).bits if fmt.promoted else fmt.bits
    for bits in _NUMBERS:
        if fmt.bits < bits <= most:
            candidate = resolve_format(bits, device, columns)
            if share * (candidate.bits_per_weight - fmt.bits_per_weight) <= MOST_ADDED:
                return candidate
    return fmt
