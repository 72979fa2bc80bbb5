"""Replies that are generated together with packed keys and values: each is the one that its request gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")
pytest.importorskip("openai")
pytest.importorskip("fastapi")

from gguf_models import tiny_model
from test_server_batches import CONTEXT, DEMO, Asked, prompts
from transformers import AutoModelForCausalLM

import isqtorch
from isqtorch.app.server.kv import Batch, PackedFullLayer, PackedLastLayer, new_cache
from isqtorch.app.server.scheduler import Scheduler
from isqtorch.app.server.stepping import Stepper, why_not_batched
from isqtorch.integrations.transformers.packed_states import PackedStates
from isqtorch.integrations.transformers.quantized_cache import new_cache as cache_argument

KV = ("q8_0", "q4_0")


def scheduler_of(model: Any, prefix_bytes: int = 1 << 24, most: int = 8) -> Scheduler:
    return Scheduler(lambda: model, CONTEXT, most, prefix_bytes, KV)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma4_text", "gpt2", "deepseek_v3"])
def test_replies_are_those_of_generate(kind: str) -> None:
    model = tiny_model(kind)
    asked = prompts(5)
    scheduler = scheduler_of(model)
    assert scheduler.alone is None, scheduler.alone
    running = [Asked(scheduler, ids, 4 + 3 * n) for n, ids in enumerate(asked)]
    got = [reply.result() for reply in running]
    assert scheduler.measures.counts["step_rows_total"] > 2 * scheduler.measures.counts["steps_total"]  # they did share
    one_by_one = scheduler_of(model, most=1)
    for n, ids in enumerate(asked):
        expected = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, eos_token_id=[], pad_token_id=0,
            max_new_tokens=4 + 3 * n, **cache_argument(model, KV),
        )  # fmt: skip
        assert got[n] == expected[0, len(ids) :].tolist(), (kind, n)
        assert Asked(one_by_one, ids, 4 + 3 * n).result() == got[n]


def test_scores_are_the_same_bits_as_alone_and_nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With layers that round their input: torch's own give other bits for other numbers of rows."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    isqtorch.quantize_(model, "q4k", progress=False)
    assert why_not_batched(model, KV) is None
    stepper = Stepper(model)
    asked = prompts(4, 4096)

    def begun(ids: list[int]) -> Any:
        cache = new_cache(model, KV)
        stepper.read(cache, ids, 0)
        return cache

    monkeypatch.setattr(PackedStates, "floats", lambda self: pytest.fail("decoded"))
    with torch.inference_mode():
        alone = [stepper.step(Batch(begun(ids)), [5]) for ids in asked]
        batch = Batch(begun(asked[0]))
        for ids in asked[1:]:
            batch.join(begun(ids))
        assert torch.equal(stepper.step(batch, [5] * 4), torch.cat(alone))
        batch.keep([2, 1])
        again = [Batch(begun(asked[n])) for n in (2, 1)]
        for one in again:
            stepper.step(one, [5])
        expected = torch.cat([stepper.step(one, [9]) for one in again])
        assert torch.equal(stepper.step(batch, [9] * 2), expected)
    assert all(type(layer) in (PackedFullLayer, PackedLastLayer) for layer in batch.cache.layers)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_known_beginning_is_not_read_again(kind: str) -> None:
    model = tiny_model(kind, sliding_window=1000, max_position_embeddings=1000)
    beginning = [(7 * i) % 90 + 3 for i in range(300)]
    asked = [[*beginning, 5, 6], [*beginning, 8, 9, 10], beginning[:200], [4, *beginning]]
    plain = scheduler_of(model, prefix_bytes=0)
    expected = [Asked(plain, ids).result() for ids in asked]
    scheduler = scheduler_of(model)
    assert [Asked(scheduler, ids).result() for ids in asked] == expected
    assert scheduler.measures.counts["reused_tokens_total"] == 256 + 128
