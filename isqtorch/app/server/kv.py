"""The keys and values of several replies in one cache, so that one step of the model gives a token to each of them.

Each reply is a row. Its tokens end at the last column; a row that is shorter than the others has padding on its left,
which the attention mask hides. `generate` lays out a batch in the same way, so every model that it can batch fits.
Replies join and leave between steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from isqtorch.integrations.transformers.cache import GrowingLayer, GrowingWindowLayer
from isqtorch.integrations.transformers.packed_states import attend_packed
from isqtorch.integrations.transformers.quantized_cache import PackedLayer, PackedWindowLayer

_LAYERS = {"full_attention", "sliding_attention"}  # each token sees all tokens before it, or the last ones
_EMPTY = getattr(cache_utils, "DummyLayer", None)  # transformers 5.24: a layer that uses the keys of another


class FullLayer(GrowingLayer):
    """A layer that keeps all columns."""

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Other rows or columns; `keys` and `values` are not changed later."""
        self.keys, self.values = keys, values


class WindowLayer(GrowingWindowLayer):
    """A layer that keeps the last columns only."""

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Other rows or columns."""
        self.keys, self.values = keys, values


class PackedFullLayer(PackedLayer):
    """A layer of packed rows that keeps all columns."""

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Other rows or columns; `keys` and `values` are not changed later."""
        self.keys, self.values = keys, values


class PackedLastLayer(PackedWindowLayer):
    """A layer of packed rows that keeps the last columns only."""

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Other rows or columns."""
        self.keys, self.values = keys, values


def new_cache(model: Any, kv: tuple[str, str] | None = None) -> DynamicCache | None:
    """An empty cache of one row; None: the model has layers whose state cannot be joined.

    Args:
        model: the model.
        kv: the formats of keys and of values; None: floats.
    """
    config = model.config.get_text_config(decoder=True)
    if set(getattr(config, "layer_types", None) or ()) - _LAYERS or getattr(config, "attention_chunk_size", None):
        return None
    cache = DynamicCache(config=config)
    if kv is not None:
        attend_packed()
    layers: list[Any] = []
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layers.append(FullLayer() if kv is None else PackedFullLayer(*kv))
        elif type(layer) is DynamicSlidingWindowLayer:
            window = layer.sliding_window
            layers.append(WindowLayer(window) if kv is None else PackedLastLayer(window, *kv))
        elif type(layer) is _EMPTY:
            layers.append(layer)
        else:
            return None
    if not layers:  # the configuration does not say what the layers are like: they are made when they are used
        return None
    cache.layers = layers
    return cache


def columns_of(cache: DynamicCache) -> int:
    """Columns of a cache, those that a window has dropped included."""
    return max((layer.get_seq_length() for layer in cache.layers if _holds(layer)), default=0)


@dataclass
class Prefix:
    """The keys and values of the first tokens of a text, for a later text that begins with them."""

    layers: list[tuple[Tensor, Tensor] | None]

    @property
    def size(self) -> int:
        """Bytes."""
        pairs = [pair for pair in self.layers if pair is not None]
        return sum(keys.nbytes + values.nbytes for keys, values in pairs)

    def fill(self, cache: DynamicCache, tokens: int) -> None:
        """Make the first `tokens` of them the content of an empty cache."""
        for layer, pair in zip(cache.layers, self.layers, strict=True):
            if pair is not None:
                keys, values = pair[0][:, :, :tokens], pair[1][:, :, :tokens]
                if isinstance(layer, (PackedFullLayer, PackedLastLayer)):
                    layer.hold(keys, values)
                else:
                    layer.update(keys, values)


class Batch:
    """Rows that step together.

    Attributes:
        cache: the keys and values of all rows.
        tokens: of each row, the tokens that the cache holds.
        columns: of the cache; the longest row fills all of them.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.cache, self.columns = cache, columns_of(cache)
        self.tokens = [self.columns]

    def join(self, cache: DynamicCache) -> None:
        """Add the only row of another cache as the last row."""
        other = columns_of(cache)
        columns = max(self.columns, other)
        joined = []  # all is made before anything is changed: memory may run out
        for mine, new in zip(self.cache.layers, cache.layers, strict=True):
            if _holds(mine):
                window = getattr(mine, "sliding_window", None)
                held = columns if window is None else min(columns, window - 1)
                keys = torch.cat([_widened(mine.keys, held), _widened(new.keys, held)])
                joined.append((mine, keys, torch.cat([_widened(mine.values, held), _widened(new.values, held)])))
        for layer, keys, values in joined:
            layer.replace(keys, values)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = columns
        self.columns = columns
        self.tokens.append(other)

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the columns that only they needed."""
        self.tokens = [self.tokens[row] for row in rows]
        drop = self.columns - max(self.tokens)
        self.columns -= drop
        for layer in self.cache.layers:
            if not _holds(layer):
                continue
            held = min(layer.keys.shape[-2], self.columns)
            index = torch.tensor(rows, device=layer.keys.device)
            layer.replace(layer.keys[index][:, :, -held:], layer.values[index][:, :, -held:])
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = self.columns

    def inputs(self, tokens: list[int], device: torch.device) -> dict[str, Tensor]:
        """What the model needs for the next token of each row; the cache grows by one column."""
        lengths = torch.tensor(self.tokens, device=device).unsqueeze(1)
        columns = torch.arange(self.columns + 1, device=device)
        return {
            "input_ids": torch.tensor(tokens, device=device).unsqueeze(1),
            "attention_mask": (columns >= self.columns - lengths).long(),
            "position_ids": lengths,
        }

    def stepped(self) -> None:
        """Note that the model has seen one more token of each row."""
        self.columns += 1
        self.tokens = [tokens + 1 for tokens in self.tokens]


def beginning(cache: DynamicCache, tokens: int) -> Prefix | None:
    """A copy of the first tokens of a cache of one row; None if a window has dropped them."""
    columns = columns_of(cache)
    layers: list[tuple[Tensor, Tensor] | None] = []
    for layer in cache.layers:
        if not _holds(layer):
            layers.append(None)
        elif layer.keys.shape[-2] < columns:
            return None
        else:
            layers.append((layer.keys[:, :, :tokens].clone(), layer.values[:, :, :tokens].clone()))
    return Prefix(layers)


def _holds(layer: Any) -> bool:
    """Whether a layer has keys and values; some use those of another layer."""
    return layer.is_initialized and layer.keys is not None


def _widened(states: Tensor, columns: int) -> Tensor:
    """States with padding on the left; zeros, because what the mask hides is multiplied with 0."""
    missing = columns - states.shape[-2]
    return states if missing <= 0 else functional.pad(states, (0, 0, missing, 0))
