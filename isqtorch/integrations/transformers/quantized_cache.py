"""`isqtorch.QuantizedCache`: the keys and values of a transformers model in q8_0, q4_0 or another format of 32 numbers.

New tokens are packed once, as they come, and stay packed. Attention reads the blocks (`packed_states.py`). A prompt
that begins a cache attends to its own floats, which are at hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
import transformers.generation.utils as generation
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from isqtorch.formats.kv import KV_BLOCK, kv_formats

from .packed_states import PackedStates, attend_packed

_LEAST_ROOM, _MOST_ROOM = 32, 256  # tokens to add when a store is full; between them, an eighth of what it holds


class Rows:
    """Packed rows `[B, heads, tokens, row_bytes]` with room for further tokens.

    Without room, every token would copy all that are before it.
    """

    def __init__(self, rows: Tensor) -> None:
        self._store, self._start, self._stop = rows, 0, rows.shape[2]

    @property
    def view(self) -> Tensor:
        """The rows that are in use."""
        return self._store[:, :, self._start : self._stop]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, room included."""
        return self._store.nbytes

    def use(self, rows: Tensor) -> None:
        """Other rows, which are not changed later, or a range of the present tokens, which keeps the room."""
        mine = self._store
        if (
            rows.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()
            and rows.stride() == mine.stride()
            and rows.shape[:2] == mine.shape[:2]
            and (rows.storage_offset() - mine.storage_offset()) % mine.stride(2) == 0
        ):
            self._start = (rows.storage_offset() - mine.storage_offset()) // mine.stride(2)
            self._stop = self._start + rows.shape[2]
        else:
            self._store, self._start, self._stop = rows, 0, rows.shape[2]

    def append(self, rows: Tensor) -> None:
        """Add tokens at the end."""
        end = self._stop + rows.shape[2]
        if end > self._store.shape[2]:
            held = self.view
            count = held.shape[2] + rows.shape[2]
            room = min(max(count // 8, _LEAST_ROOM), _MOST_ROOM)
            self._store = held.new_empty((*held.shape[:2], count + room, held.shape[3]))
            self._store[:, :, : held.shape[2]] = held
            self._start, self._stop, end = 0, held.shape[2], count
        self._store[:, :, self._stop : end] = rows
        self._stop = end


class Packing:
    """What the layers of both kinds share: `keys` and `values` are the packed rows, uint8 `[B, heads, tokens, bytes]`.

    transformers' own methods cut, select and repeat these rows as they do with floats.
    """

    keys_format: str
    values_format: str
    is_initialized: bool
    _rows: tuple[Rows | None, Rows | None] = (None, None)
    _like: tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]  # head_dim and type of keys and of values

    @property
    def keys(self) -> Tensor | None:
        """Packed keys."""
        return None if self._rows[0] is None else self._rows[0].view

    @keys.setter
    def keys(self, rows: Tensor | None) -> None:
        self._rows = _used(self._rows[0], rows), self._rows[1]

    @property
    def values(self) -> Tensor | None:
        """Packed values."""
        return None if self._rows[1] is None else self._rows[1].view

    @values.setter
    def values(self, rows: Tensor | None) -> None:
        self._rows = self._rows[0], _used(self._rows[1], rows)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(rows.nbytes for rows in self._rows if rows is not None)

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Make packed rows, which are not changed later, the content."""
        self.device, self.is_initialized = keys.device, True
        self.keys, self.values = keys, values
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = keys.shape[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold no tokens."""
        self.device = key_states.device
        self.keys, self.values = (
            _packed(name, states[:, :, :0], fmt)
            for name, states, fmt in (
                ("keys", key_states, self.keys_format),
                ("values", value_states, self.values_format),
            )
        )
        self.is_initialized = True

    def reset(self) -> None:
        """Forget all tokens."""
        self._rows, self.is_initialized = (None, None), False
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = 0

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all that are held, or the floats given if there are no others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._like = (key_states.shape[-1], key_states.dtype), (value_states.shape[-1], value_states.dtype)
        keys, values = self._rows
        assert keys is not None and values is not None
        first = keys.view.shape[2] == 0
        packed = _packed("keys", key_states, self.keys_format), _packed("values", value_states, self.values_format)
        keys.append(packed[0])
        values.append(packed[1])
        if first:
            return key_states, value_states
        return self._states(keys.view, values.view)

    def _states(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Packed rows as tensors that attention and all other code can read."""
        return PackedStates(keys, self.keys_format, *self._like[0]), PackedStates(
            values, self.values_format, *self._like[1]
        )


class PackedLayer(Packing, DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A layer that keeps all tokens."""

    def __init__(self, keys: str = "q8_0", values: str = "q8_0", **_: Any) -> None:
        DynamicLayer.__init__(self)
        self.keys_format, self.values_format = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; returns the keys and values of all."""
        return self._append(key_states, value_states)


class PackedWindowLayer(Packing, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer whose tokens see the last ones only, which it keeps."""

    def __init__(self, sliding_window: int, keys: str = "q8_0", values: str = "q8_0", **_: Any) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.keys_format, self.values_format = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; returns the keys and values that they may see."""
        new, before = key_states.shape[2], self.sliding_window - 1
        self.cumulative_length += new
        keys, values = self._append(key_states, value_states)
        if getattr(self, "record_past", False):  # `crop` cuts later
            return keys[:, :, -(before + new) :], values[:, :, -(before + new) :]
        held = self.keys
        assert held is not None and self.values is not None
        start = max(held.shape[2] - before, 0)
        self.keys, self.values = held[:, :, start:], self.values[:, :, start:]
        return keys, values


class QuantizedCache(DynamicCache):  # type: ignore[misc]
    """Keys and values in few bits: long contexts in half (q8_0) or 28 % (q4_0) of the memory of bf16.

    Give it to `generate` or to a model as `cache`. It can be continued, reordered, cropped, copied and pickled like a
    `DynamicCache`. On a CPU, attention of a few queries reads the packed blocks, which is faster than with floats; on
    other devices, and for attention functions other than "sdpa", the blocks are decoded, a layer at a time.

    Args:
        config: the configuration of the model.
        format: of keys and values: "q8_0" or 8, "q5_1" or 5, "q4_0" or 4, q5_0, q4_1, iq4_nl; or two, "q8_0/q4_0",
            that of keys first.
        values: the format of values, if it is another one.

    Raises:
        ValueError: there is no such format.
        NotImplementedError: a layer of the model keeps something else than keys and values, or as well.

    Example:
        cache = isqtorch.QuantizedCache(model.config, "q8_0")
        out = model.generate(**inputs, cache=cache, max_new_tokens=200)
        print(cache.nbytes)
    """

    layers: list[Any]

    def __init__(self, config: Any, format: int | str = "q8_0", values: int | str | None = None) -> None:
        self.formats = kv_formats(format, values)
        super().__init__(config=config)
        plain = {DynamicLayer: PackedLayer, DynamicSlidingWindowLayer: PackedWindowLayer}
        keys, vals = self.formats
        refused = sorted(
            {
                type(layer).__name__
                for layer in self.layers
                if isinstance(layer, DynamicLayer) and type(layer) not in plain
            }
        )
        if refused:
            raise NotImplementedError(
                f"QuantizedCache: {type(config).__name__} has layers of the kind {', '.join(refused)}; there are packed layers "
                f"for {', '.join(kind.__name__ for kind in plain)}. Generate with transformers' DynamicCache."
            )
        self.layers = [
            plain[type(layer)](keys=keys, values=vals, sliding_window=getattr(layer, "sliding_window", None))
            if type(layer) in plain
            else layer
            for layer in self.layers
        ]
        attend_packed()

    @property
    def nbytes(self) -> int:
        """Bytes of memory for keys and values, room for further tokens included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, Packing))

    def __repr__(self) -> str:
        keys, values = self.formats
        return f"QuantizedCache({keys if keys == values else f'{keys}/{values}'}, {len(self.layers)} layers)"


def new_cache(model: Any, formats: tuple[str, str] | None) -> dict[str, Any]:
    """The argument of `generate` or of a forward that gives a model an empty cache; none for `formats` None."""
    if formats is None:
        return {}
    taken = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in taken else "past_key_values"  # its name changes in transformers 5.24
    return {name: QuantizedCache(model.config, *formats)}


def check_cache(cls: Any, config: Any, formats: tuple[str, str]) -> None:
    """ValueError if models of this class cannot have a cache of packed keys and values."""
    name = getattr(cls, "__name__", str(cls))
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"packed keys and values are for decoders; {name} has an encoder, too. Leave them as floats.")
    if not getattr(cls, "_supports_default_dynamic_cache", lambda: False)() or getattr(cls, "_is_stateful", False):
        raise ValueError(f"{name} keeps no keys and values that could be packed. Leave its state as it is.")
    try:
        QuantizedCache(config, *formats)
    except NotImplementedError as error:
        raise ValueError(str(error)) from error


def offer_backend() -> None:
    """Let `generate(cache_implementation="quantized", cache_config={"backend": "isqtorch", "format": "q8_0"})` work.

    transformers has a fixed list of backends in the function that it calls. The wrapper passes all others on.
    """
    usual = generation.QuantizedCache
    if hasattr(usual, "_isqtorch_wrapped"):
        return

    @wraps(usual, updated=())
    def quantized_cache(backend: str, config: Any, **options: Any) -> Any:
        return (
            _of_options(config, options) if backend == "isqtorch" else usual(backend=backend, config=config, **options)
        )

    quantized_cache._isqtorch_wrapped = usual  # type: ignore[attr-defined]
    generation.QuantizedCache = quantized_cache


def _of_options(config: Any, options: dict[str, Any]) -> QuantizedCache:
    """The cache that a `cache_config` describes."""
    unknown = _quoted(options.keys() - {"format", "values", "nbits"})
    if unknown:
        raise ValueError(
            f'cache_config of the backend "isqtorch" has "format" (or "nbits": 8, 5, 4) and "values", not {unknown}'
        )
    if "format" in options and "nbits" in options:
        raise ValueError('cache_config of the backend "isqtorch": give "format" or "nbits", not both')
    return QuantizedCache(config, options.get("format", options.get("nbits", "q8_0")), options.get("values"))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names))


def _used(present: Rows | None, rows: Tensor | None) -> Rows | None:
    if rows is None:
        return None
    if present is None:
        return Rows(rows)
    present.use(rows)
    return present


def _packed(name: str, states: Tensor, format: str) -> Tensor:
    """Pack states `[B, heads, tokens, head_dim]`; zeros fill the last block of a row."""
    missing = -states.shape[-1] % KV_BLOCK
    if missing:
        states = functional.pad(states, (0, missing))
    try:
        packed: Tensor = torch.ops.isqtorch.quantize(states.detach(), format)
    except ValueError as error:
        raise ValueError(
            f"QuantizedCache: {name} {list(states.shape)} cannot be packed: {error} Or generate with transformers' DynamicCache."
        ) from error
    return packed
