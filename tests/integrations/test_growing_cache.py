"""The cache that is written in place: it holds what that of transformers holds, after every change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", "5.23")

from isqtorch.integrations.transformers.cache import GrowingLayer, GrowingWindowLayer, growing_layer  # noqa: E402


def columns(*sizes: int) -> Iterator[tuple[Tensor, Tensor]]:
    for size in sizes:
        yield torch.randn(2, 3, size, 8), torch.randn(2, 3, size, 8)


@pytest.mark.parametrize("window", [None, 2, 7, 40])
def test_the_cache_holds_what_that_of_transformers_holds(window: int | None) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1)
    if window is not None:
        config = transformers.MistralConfig(num_hidden_layers=1, sliding_window=window)
    theirs, ours = transformers.DynamicCache(config=config), transformers.DynamicCache(config=config)
    for step, (keys, values) in enumerate(columns(5, 1, 1, 1, 9, 1, 1, 100, *[1] * 80, 3)):
        if step == 1:
            assert type(growing_layer(ours, 0)) is (GrowingLayer if window is None else GrowingWindowLayer)
        assert ours.get_mask_sizes(keys.shape[2], 0) == theirs.get_mask_sizes(keys.shape[2], 0)
        for a, b in zip(theirs.update(keys, values, 0), ours.update(keys, values, 0), strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
        assert torch.equal(ours.layers[0].values, theirs.layers[0].values)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.reset(),
        lambda cache: None,
    ],
    ids=["crop", "reorder", "repeat", "select", "reset", "nothing"],
)
def test_changes_of_the_cache(change: Any) -> None:
    theirs, ours = transformers.DynamicCache(), transformers.DynamicCache()
    for keys, values in columns(6):
        theirs.update(keys, values, 0), ours.update(keys, values, 0)
    growing_layer(ours, 0)
    for keys, values in columns(1, 1):
        theirs.update(keys, values, 0), ours.update(keys, values, 0)
    given = ours.layers[0].keys
    held = given.clone()
    change(theirs), change(ours)
    batch = 2 if ours.layers[0].keys is None else ours.layers[0].keys.shape[0]
    for _ in range(3):
        keys, values = torch.randn(batch, 3, 1, 8), torch.randn(batch, 3, 1, 8)
        for a, b in zip(theirs.update(keys, values, 0), ours.update(keys, values, 0), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(given, held), "a tensor that was given away has changed"
    twin = copy.deepcopy(ours)
    ours.update(*next(columns(1)), 0) if batch == 2 else None
    assert torch.equal(twin.layers[0].keys, theirs.layers[0].keys)


def test_a_step_that_does_not_fit_is_an_error_as_before() -> None:
    cache = transformers.DynamicCache()
    cache.update(torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), 0)
    growing_layer(cache, 0)
    cache.update(torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8), 0)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        cache.update(torch.randn(1, 3, 1, 8), torch.randn(1, 3, 1, 8), 0)


def test_other_caches_stay_as_they_are() -> None:
    for cache in (transformers.StaticCache(transformers.LlamaConfig(num_hidden_layers=1), max_cache_len=8), None, {}):
        assert growing_layer(cache, 0) is None
