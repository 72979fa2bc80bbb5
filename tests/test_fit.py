"""fit: sizes of caches, and the memory of this machine, containers included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_gpt2, tiny_llama

from isqtorch.report import fit
from isqtorch.report.plan import plan


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_cache_is_as_large_as_the_models(make) -> None:
    """Against the tensors of a cache that transformers filled."""
    model = make()
    cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    real = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert 10 * fit.cache_bytes_per_token(model.config.to_dict() | {"dtype": str(model.dtype)[6:]}) == real


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 2}, {"kv_lora_rank": 8, "num_hidden_layers": 2}])
def test_an_unknown_cache_is_not_guessed(config: dict) -> None:
    assert fit.cache_bytes_per_token(config) is None
    assert fit.cache_bytes_per_token({"text_config": config}) is None


def test_overview_agrees_with_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(hidden=288).save_pretrained(tmp_path)
    found = fit.overview(tmp_path, ["q4k", 8], context=100, topology={"0": "q6k"})
    for spec, name in (("q4k", "q4k"), (8, "8")):
        want = plan(tmp_path, spec, topology={"0": "q6k"})
        assert found.reports[name].bytes_after == want.bytes_after and found.reports[name].layers == want.layers
    assert found.context == 100 and found.cache_bytes == 100 * 2 * 2 * 2 * 64 * 2
    between = found.reports["q4k"].bytes_after + found.cache_bytes
    monkeypatch.setattr(fit, "_host", lambda: fit.Memory("RAM", 1 << 40, between))
    assert fit.overview(tmp_path, [4], context=100, topology={"0": "q6k"}).fits(between - found.cache_bytes)["RAM"]
    assert not fit.overview(tmp_path, [4], context=101, topology={"0": "q6k"}).fits(between - found.cache_bytes)["RAM"]


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_CGROUP", tmp_path)
    whole = fit.memories()[0]
    assert 0 < whole.free <= whole.total
    (tmp_path / "memory.max").write_text("max\n")
    assert fit.memories()[0].total == whole.total
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\nfile 600000\n")
    assert fit.memories()[0] == fit.Memory("RAM", 1_000_000, 700_000)
