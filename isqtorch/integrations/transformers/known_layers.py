"""Which layers of transformers can be computed by the operators of a decoding step.

The code of a layer's forward says what it computes. Many families share the code of a few, so a forward is compared
with those of a few classes, instruction by instruction. Sizes, weights and settings are read from the layer, and a
trial (`decoding.py`) compares its results.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from types import CodeType
from typing import Any

_ATTENTIONS = (
    ("llama", "LlamaAttention"),
    ("mistral", "MistralAttention"),
    ("qwen2", "Qwen2Attention"),
    ("qwen3", "Qwen3Attention"),
    ("gemma3", "Gemma3Attention"),
    ("phi3", "Phi3Attention"),
)
_DECODERS = (
    ("llama", "LlamaDecoderLayer"),
    ("mistral", "MistralDecoderLayer"),
    ("qwen2", "Qwen2DecoderLayer"),
    ("mixtral", "MixtralDecoderLayer"),
    ("qwen3", "Qwen3DecoderLayer"),
    ("qwen3_moe", "Qwen3MoeDecoderLayer"),
    ("gemma3", "Gemma3DecoderLayer"),
    ("phi3", "Phi3DecoderLayer"),
)
_MLPS = (("llama", "LlamaMLP"), ("phi3", "Phi3MLP"))


def is_known_attention(kind: type) -> bool:
    """Whether a class is an attention that the operators compute."""
    return _is_like(kind, _ATTENTIONS)


def is_known_decoder(kind: type) -> bool:
    """Whether a class is a decoder layer that adds attention and MLP to its input, with norms before and after."""
    return _is_like(kind, _DECODERS)


def is_known_mlp(kind: type) -> bool:
    """Whether a class is an MLP of gate, up and down projection."""
    return _is_like(kind, _MLPS)


@cache
def _is_like(kind: type, known: tuple[tuple[str, str], ...]) -> bool:
    own = _instructions(kind)
    return own is not None and any(own == _reference(*name) for name in known)


@cache
def _reference(model: str, name: str) -> Any:
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:  # a version without this model
        return None
    kind = getattr(module, name, None)
    return None if kind is None else _instructions(kind)


def _instructions(kind: type) -> Any:
    """What a class's forward does, without the decorators of transformers; None: it is no function of Python."""
    forward = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    code = getattr(forward, "__code__", None)
    if not isinstance(code, CodeType) or code.co_freevars:
        return None
    # Nested functions are compared by their code; the documentation does not matter.
    constants = tuple(
        value.co_code if isinstance(value, CodeType) else value for value in code.co_consts if value != forward.__doc__
    )
    return code.co_code, code.co_names, code.co_varnames, constants
