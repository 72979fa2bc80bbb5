"""Layers of a key-value cache that are written in place.

transformers appends a token by concatenation, which copies the keys and values of all tokens before it. These layers
keep spare columns and double their room when it is full. Tensors that they gave away are never overwritten: whatever
removes or reorders columns starts a new store at the next token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 64  # spare columns at least


@dataclass
class Store:
    """Keys and values `[B, H, C, D]`, of which the columns [first, last) are in use."""

    keys: Tensor
    values: Tensor
    first: int
    last: int


class _Growing:
    """What the layers share: `keys` and `values` are views of the used columns, made when they are asked for."""

    _store: Store | None = None
    _loose: tuple[Tensor | None, Tensor | None] = (None, None)  # keys and values without spare columns

    @property
    def keys(self) -> Tensor | None:
        """The keys `[B, H, columns, D]`."""
        store = self._store
        return self._loose[0] if store is None else store.keys[:, :, store.first : store.last]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._loose, self._store = (value, self.values), None

    @property
    def values(self) -> Tensor | None:
        """The values `[B, H, columns, D]`."""
        store = self._store
        return self._loose[1] if store is None else store.values[:, :, store.first : store.last]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._loose, self._store = (self.keys, value), None

    def reserve(self, batch: int, heads: int, dim: int, dtype: torch.dtype, columns: int = 1) -> Store | None:
        """Return the store with room for some more columns, or None if they do not fit in it.

        The caller writes to the columns from `last` on, and calls `commit`.
        """
        store = self._store
        if store is None or store.last + columns > store.keys.shape[2]:
            store = self._grow(columns)
            if store is None:
                return None
        keys = store.keys
        return (
            store
            if keys.shape[0] == batch and keys.shape[1] == heads and keys.shape[3] == dim and (keys.dtype is dtype)
            else None
        )

    def commit(self, columns: int = 1) -> None:
        """Count columns that were written."""
        assert self._store is not None
        self._store.last += columns

    def _grow(self, columns: int) -> Store | None:
        keys, values = self.keys, self.values
        if keys is None or values is None or keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            return None
        if keys.requires_grad or values.requires_grad or keys.device.type != "cpu":
            return None
        used = keys.shape[2]
        room = max(2 * used, used + columns + _ROOM)
        with torch.inference_mode(False):  # such a tensor can be written to inside of inference mode and outside
            grown = [part.new_empty((*part.shape[:2], room, part.shape[3])) for part in (keys, values)]
        with torch.no_grad():
            grown[0][:, :, :used] = keys
            grown[1][:, :, :used] = values
        self._store, self._loose = Store(grown[0], grown[1], 0, used), (None, None)
        return self._store

    def _append(self, keys: Tensor, values: Tensor) -> bool:
        """Write columns into the store; False: they do not fit in it."""
        if keys.requires_grad or values.requires_grad or keys.shape != values.shape or keys.dtype != values.dtype:
            return False
        batch, heads, columns, dim = keys.shape
        store = self.reserve(batch, heads, dim, keys.dtype, columns)
        if store is None or store.values.dtype is not keys.dtype or store.values.shape != store.keys.shape:
            return False
        with torch.no_grad():
            store.keys[:, :, store.last : store.last + columns] = keys
            store.values[:, :, store.last : store.last + columns] = values
        return True


class GrowingLayer(_Growing, DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A layer whose tokens see all tokens before them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append columns, and return all of them."""
        if not self.is_initialized or not self._append(key_states, value_states):
            updated: tuple[Any, Any] = super().update(key_states, value_states, *args, **kwargs)
            return updated
        self.commit(key_states.shape[2])
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """The number of columns."""
        store = self._store
        length: int = super().get_seq_length() if store is None else store.last - store.first
        return length


class GrowingWindowLayer(_Growing, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer whose tokens see the last tokens only."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append columns, and return those that the new tokens see."""
        if self.record_past or not self.is_initialized or not self._append(key_states, value_states):
            updated: tuple[Any, Any] = super().update(key_states, value_states, *args, **kwargs)
            return updated
        store, columns = self._store, key_states.shape[2]
        assert store is not None
        seen = slice(store.first, store.last + columns)
        self.commit(columns)
        return store.keys[:, :, seen], store.values[:, :, seen]

    def commit(self, columns: int = 1) -> None:
        """Count columns that were written, and leave those that no later token sees."""
        super().commit(columns)
        assert self._store is not None
        self.cumulative_length += columns
        self._store.first = max(self._store.first, self._store.last - self.sliding_window + 1)

    def reserve(self, batch: int, heads: int, dim: int, dtype: torch.dtype, columns: int = 1) -> Store | None:
        """See `_Growing.reserve`. A layer that records the past for `crop` keeps more columns than a token sees."""
        return None if self.record_past else super().reserve(batch, heads, dim, dtype, columns)


_GROWING = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingWindowLayer}


def growing_layer(cache: Any, index: int) -> GrowingLayer | GrowingWindowLayer | None:
    """Return a layer of a cache that is written in place.

    A layer of transformers is exchanged for one of ours, with the same content.

    Args:
        cache: any cache.
        index: number of the layer.

    Returns:
        The layer; None: the cache or the layer is of another kind.
    """
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    kind = type(layer)
    if isinstance(layer, (GrowingLayer, GrowingWindowLayer)):
        return layer
    if kind not in _GROWING or not layer.is_initialized or getattr(layer, "sliding_window", 2) < 2:
        return None
    grown: Any = _GROWING[kind].__new__(_GROWING[kind])
    state = dict(vars(layer))
    grown._loose = (state.pop("keys"), state.pop("values"))
    vars(grown).update(state)
    cache.layers[index] = grown
    made: GrowingLayer | GrowingWindowLayer = grown
    return made
