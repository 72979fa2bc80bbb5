"""Texts as token ids, for everything that runs a model over one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Ids = Tensor | Sequence[int] | str
"""Token ids `[T]` or `[1, T]`, or a text, which then needs a tokenizer."""


def token_ids(ids_or_text: Ids, tokenizer: Any, op: str) -> Tensor:
    """Token ids of what a user gave.

    Args:
        ids_or_text: token ids `[T]` or `[1, T]` on any device, or a text.
        tokenizer: transformers', or one with `encode`; not needed with ids.
        op: for messages.

    Returns:
        int64 `[T]` on the CPU.

    Raises:
        ValueError: neither a text nor ids, or a text without a tokenizer.
    """
    if isinstance(ids_or_text, str):
        if tokenizer is None:
            raise ValueError(f"{op}: a text needs tokenizer=...; or give token ids")
        return torch.tensor(_tokenize(tokenizer, ids_or_text), dtype=torch.int64)
    try:
        ids = torch.as_tensor(ids_or_text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{op}: after the model comes a text or token ids, then the tokenizer; got a {type(ids_or_text).__name__}, which makes "
            f"no ids: {error}"
        ) from None
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"{op}: token ids must have shape [T] or [1, T], got {list(ids.shape)}")
    if len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ValueError(f"{op}: token ids must be integers, got {ids.dtype}")
    return ids.to("cpu", torch.int64)


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    if callable(tokenizer):  # transformers; quiet, because it warns of every text longer than the model's context
        return list(tokenizer(text, verbose=False)["input_ids"])
    encoded = tokenizer.encode(text)  # tokenizers.Tokenizer, sentencepiece
    return list(getattr(encoded, "ids", encoded))


def bos_token(tokenizer: Any) -> int | None:
    """The BOS token, if the tokenizer puts one before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and _tokenize(tokenizer, "a")[:1] == [bos] else None


Model = Callable[..., Any]
"""Anything that maps ids `[B, T]` to logits `[B, T, vocab]`: a tensor, a tuple that begins with it, or an object with .logits."""


def context_length(model: Model) -> int | None:
    """The most tokens a transformers model takes at once; None where it does not say."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def text_config(model: Model) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


@contextmanager
def evaluating(model: Tensor | Model) -> Iterator[None]:
    """No gradients and eval mode; every submodule gets its own training flag back.

    Not inference_mode: what a model caches during a forward must stay usable in training.
    """
    if not isinstance(model, nn.Module):
        with torch.no_grad():
            yield
        return
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        model.train(flags[0][1])  # a call and not just the flags: some modules act on it
        for module, training in flags:
            module.training = training


def run_model(model: Model, ids: Tensor) -> Any:
    """What a model returns for ids `[B, T]`, from an empty cache that is not kept."""
    extra: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        parameter = next(model.parameters(), None)
        if parameter is not None:
            ids = ids.to(parameter.device)
        if "use_cache" in inspect.signature(model.forward).parameters:
            extra["use_cache"] = False  # transformers would keep keys and values that nobody reads
    return model(ids, **extra)
