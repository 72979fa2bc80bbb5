"""Attention of each row of a batch by itself, so that the tokens of a reply do not depend on the replies beside it.

Attention over padded rows gives the same numbers but for their last bits: its sums are split elsewhere. Linear layers
that round their input to 8 bits make these bits larger from layer to layer, until another token is chosen. So each row
is computed with the shapes it has when it is alone. This also skips the padding.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

_PREFIX = "isqtorch-rows-"
_KINDS = ("sdpa", "eager")  # the others have rows of different lengths as an input of their kernels


class _Step(threading.local):
    """The step that a thread is in."""

    tokens: list[int] | None = None  # of each row, the new one included; None: no step of a batch


_STEP = _Step()


def attend_rowwise(model: Any) -> None:
    """Let steps within `rows` compute each row by itself, if the model takes another function for its attention.

    Outside of `rows` the model computes what it did before.
    """
    kind = model.config.get_text_config(decoder=True)._attn_implementation
    if kind not in _KINDS or not model._can_set_attn_implementation():
        return
    name = _PREFIX + kind
    AttentionInterface.register(name, _rowwise(kind))
    AttentionMaskInterface.register(name, _masked(AttentionMaskInterface._global_mapping[kind]))
    model.set_attn_implementation(name)


@contextmanager
def rows(tokens: list[int]) -> Iterator[None]:
    """A step of a batch whose rows have that many tokens, the new one included."""
    _STEP.tokens = tokens
    try:
        yield
    finally:
        _STEP.tokens = None


def _rowwise(kind: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        usual = _usual(module, kind)
        if _STEP.tokens is None:
            whole: tuple[Tensor, Tensor | None] = usual(module, query, key, value, attention_mask, **settings)
            return whole
        held = key.shape[-2]  # fewer than all columns in a layer with a window
        parts = []
        for row, tokens in enumerate(_STEP.tokens):
            start = held - min(tokens, held)
            own, keys, values = query[row : row + 1], key[row : row + 1, :, start:], value[row : row + 1, :, start:]
            parts.append(usual(module, own, keys, values, None, **settings)[0])
        return torch.cat(parts), None

    return attention


def _usual(module: Any, kind: str) -> Any:
    """What the model calls without this file; a model can have a function of its own for a kind."""
    own = sys.modules[type(module).__module__]
    eager = getattr(own, "eager_attention_forward", None)
    return getattr(own, "ALL_ATTENTION_FUNCTIONS", AttentionInterface()).get(kind, eager)


def _masked(usual: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **settings: Any) -> Any:
        return usual(*args, **settings) if _STEP.tokens is None else None  # one query sees all columns of its row

    return mask
