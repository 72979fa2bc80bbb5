"""Run a model over a text: token ids from the text, eval mode without gradients, a forward without a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Ids = Tensor | Sequence[int] | str
"""Token ids `[T]` or `[1, T]`, or a text. A text needs a tokenizer."""


def token_ids(ids_or_text: Ids, tokenizer: Any, op: str) -> Tensor:
    """Convert a user's text or token ids to a tensor of ids.

    Args:
        ids_or_text: token ids `[T]` or `[1, T]` on any device, or a text.
        tokenizer: a tokenizer of transformers, or an object with `encode`; not needed with ids.
        op: name of the calling function, for messages.

    Returns:
        int64 `[T]` on the CPU.

    Raises:
        ValueError: the argument is neither a text nor ids, or it is a text and there is no tokenizer.
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
    if callable(tokenizer):  # transformers; verbose=False, because it warns of texts longer than the model's context
        return list(tokenizer(text, verbose=False)["input_ids"])
    encoded = tokenizer.encode(text)  # tokenizers.Tokenizer, sentencepiece
    return list(getattr(encoded, "ids", encoded))


def bos_token(tokenizer: Any) -> int | None:
    """Return the BOS token if the tokenizer puts it before a text, else None; also None if there is no tokenizer."""
    if tokenizer is None:
        return None
    bos = getattr(tokenizer, "bos_token_id", None)  # transformers
    if bos is None and callable(getattr(tokenizer, "bos_id", None)):
        bos = tokenizer.bos_id()  # sentencepiece
    elif bos is None and not callable(tokenizer):  # tokenizers.Tokenizer, which only says which tokens are special
        encoded = tokenizer.encode("a")
        return int(encoded.ids[0]) if list(getattr(encoded, "special_tokens_mask", ()))[:1] == [1] else None
    return bos if bos is not None and _tokenize(tokenizer, "a")[:1] == [bos] else None


Model = Callable[..., Any]
"""A callable that maps ids `[B, T]` to logits `[B, T, vocab]`.

It may return the logits as a tensor, as the first item of a tuple, or as the attribute `logits` of an object.
"""


def context_length(model: Model) -> int | None:
    """Return `max_position_embeddings` of a transformers model, or None if its configuration has no such value."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def text_config(model: Model) -> Any:
    """Return a transformers model's configuration (of a multimodal model: its text part), or None if it has none."""
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


@contextmanager
def evaluating(model: Tensor | Model) -> Iterator[None]:
    """Switch gradients off and the model to eval mode; afterwards restore the training flag of every submodule.

    It uses no_grad and not inference_mode: tensors that a model caches in a forward must stay usable in training.
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
        model.train(flags[0][1])  # call train() besides setting the flags: some modules override it
        for module, training in flags:
            module.training = training


def run_model(model: Model, ids: Tensor) -> Any:
    """Run a model over ids `[B, T]` without a key-value cache, and return its output."""
    extra: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        parameter = next(model.parameters(), None)
        if parameter is not None:
            ids = ids.to(parameter.device)
        if "use_cache" in inspect.signature(model.forward).parameters:
            extra["use_cache"] = False  # otherwise transformers keeps keys and values, which are not needed here
    return model(ids, **extra)
