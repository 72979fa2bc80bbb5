"""Replies that are generated together: each is the one that its request gets alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")
pytest.importorskip("openai")
pytest.importorskip("fastapi")

from gguf_models import tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

import isqtorch
from isqtorch.app.server.kv import Batch, new_cache
from isqtorch.app.server.replies import Streamer
from isqtorch.app.server.rows import Job
from isqtorch.app.server.scheduler import Scheduler
from isqtorch.app.server.stepping import Stepper, why_not_batched

DEMO = Path(__file__).resolve().parents[2] / "examples/demo_model/model"
CONTEXT = 1024


class Letters:
    """A tokenizer whose tokens are numbers."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"{token} " for token in tokens)


class Asked:
    """A reply that a scheduler was asked for."""

    def __init__(self, scheduler: Scheduler, ids: list[int], most: int = 12, **options: Any) -> None:
        self.tokens: list[int] = []
        self.gone, self.error = False, None
        self.finished, self.begun = threading.Event(), threading.Event()
        settings = {"do_sample": False, "eos_token_id": [], "max_new_tokens": most, **options.pop("settings", {})}
        inputs = {"input_ids": torch.tensor([ids])}
        self.streamer = Streamer(Letters(), options.pop("stops", ()), None, self._emit)
        self.job = Job(inputs, GenerationConfig(**settings), self.streamer, lambda: self.gone, self._done, **options)
        scheduler.add(self.job)

    def _emit(self, text: str) -> None:
        self.tokens += [int(part) for part in text.split()]
        self.begun.set()

    def _done(self, error: Exception | None) -> None:
        self.error = error
        self.finished.set()

    def result(self) -> list[int]:
        assert self.finished.wait(60)
        if self.error is not None:
            raise self.error
        return self.tokens


def scheduler_of(model: Any, most: int = 8, prefix_bytes: int = 1 << 24) -> Scheduler:
    return Scheduler(lambda: model, CONTEXT, most, prefix_bytes)


def prompts(count: int, vocabulary: int = 96) -> list[list[int]]:
    """Texts of very different lengths."""
    return [[(i * (n + 3) + n) % (vocabulary - 3) + 3 for i in range(3 + 11 * n % 70)] for n in range(count)]


@pytest.fixture(scope="module")
def demo() -> Any:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    isqtorch.quantize_(model, "q4k", progress=False)
    return model


# ---- equal to alone --------------------------------------------------------------------------------------------------

TOGETHER = [
    "llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "gpt2", "bloom", "falcon",
    "olmo3", "cohere2", "exaone4", "mixtral", "qwen3_moe", "deepseek_v3", "stablelm", "nemotron", "glm4", "gpt_bigcode",
]  # fmt: skip


@pytest.mark.parametrize("kind", TOGETHER)
def test_replies_are_those_of_generate(kind: str) -> None:
    """Prompts of different lengths, some beyond a sliding window, that join and leave at different steps."""
    model = tiny_model(kind)
    limit = getattr(model.config, "max_position_embeddings", None) or 256
    asked = [ids[: limit - 30] for ids in prompts(7)]
    scheduler = scheduler_of(model)
    assert scheduler.alone is None, scheduler.alone
    running = [Asked(scheduler, ids, 4 + 3 * n) for n, ids in enumerate(asked)]
    got = [reply.result() for reply in running]
    assert scheduler.measures.counts["step_rows_total"] > 2 * scheduler.measures.counts["steps_total"]  # they did share
    for n, ids in enumerate(asked):
        expected = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, eos_token_id=[], pad_token_id=0,
            max_new_tokens=4 + 3 * n,
        )  # fmt: skip
        assert got[n] == expected[0, len(ids) :].tolist(), (kind, n)


@pytest.mark.parametrize("kind", ["mamba", "lfm2", "qwen3_5_text", "t5"])
def test_what_cannot_be_batched_says_why(kind: str) -> None:
    assert why_not_batched(tiny_model(kind)) is not None


def test_a_model_that_ignores_padding_is_found() -> None:
    """The trial does not rely on what a model says about itself."""
    model = tiny_model("gpt2")
    forward = model.transformer.forward

    def careless(*args: Any, attention_mask: Any = None, **named: Any) -> Any:
        return forward(*args, attention_mask=torch.ones_like(attention_mask), **named)

    assert why_not_batched(model) is None
    model.set_attn_implementation("sdpa")
    model._can_set_attn_implementation = lambda: False  # so that rows are not computed by themselves
    assert why_not_batched(model) is None
    model.transformer.forward = careless
    reason = why_not_batched(model)
    assert reason is not None and "scores change" in reason


def test_quantized_scores_are_the_same_bits_as_alone(demo: Any) -> None:
    """Layers that round their input would turn any other bit into other tokens."""
    stepper = Stepper(demo)
    asked = prompts(8, 4096)

    def begun(ids: list[int]) -> Any:
        cache = new_cache(demo)
        stepper.read(cache, ids, 0)
        return cache

    with torch.inference_mode():
        alone = [stepper.step(Batch(begun(ids)), [5]) for ids in asked]
        batch = Batch(begun(asked[0]))
        for ids in asked[1:]:
            batch.join(begun(ids))
        assert torch.equal(stepper.step(batch, [5] * 8), torch.cat(alone))
        batch.keep([6, 2, 3])
        assert batch.columns == max(len(asked[n]) for n in (6, 2, 3)) + 1
        again = [Batch(begun(asked[n])) for n in (6, 2, 3)]
        for one in again:
            stepper.step(one, [5])
        expected = torch.cat([stepper.step(one, [9]) for one in again])
        assert torch.equal(stepper.step(batch, [9] * 3), expected)


def test_sampling_depends_on_the_seed_alone(demo: Any) -> None:
    settings = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.1}
    asked = prompts(6, 4096)
    scheduler = scheduler_of(demo)
    alone = [Asked(scheduler, ids, 16, seed=n, settings=settings).result() for n, ids in enumerate(asked)]
    other = Asked(scheduler, asked[0], 16, seed=99, settings=settings).result()
    together = [Asked(scheduler, ids, 16, seed=n, settings=settings) for n, ids in enumerate(asked)]
    assert [reply.result() for reply in together] == alone
    assert alone[0] != other
    ids = torch.tensor([asked[1]])
    torch.manual_seed(1)
    sampled = demo.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, eos_token_id=[], pad_token_id=0, **settings
    )
    assert alone[1] == sampled[0, ids.shape[1] :].tolist()  # the seed means what it means for `generate`


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_known_beginning_is_not_read_again(kind: str) -> None:
    model = tiny_model(kind, sliding_window=1000, max_position_embeddings=1000)
    beginning = [(7 * i) % 90 + 3 for i in range(300)]
    asked = [[*beginning, 5, 6], [*beginning, 8, 9, 10], beginning[:200], [4, *beginning]]
    plain = scheduler_of(model, prefix_bytes=0)
    expected = [Asked(plain, ids).result() for ids in asked]
    assert plain.measures.counts["reused_tokens_total"] == 0
    scheduler = scheduler_of(model)
    assert [Asked(scheduler, ids).result() for ids in asked] == expected
    assert scheduler.measures.counts["reused_tokens_total"] == 256 + 128  # whole pieces of 128
    scheduler.submit(lambda: None).result()  # like a change of the format
    assert Asked(scheduler, asked[0]).result() == expected[0]
    assert scheduler.measures.counts["reused_tokens_total"] == 256 + 128


def test_kept_beginnings_are_bounded() -> None:
    model = tiny_model("llama", max_position_embeddings=1000)
    size = 128 * 2 * 2 * 2 * 64 * 4  # a piece of 128 tokens, keys and values, 2 layers, 2 heads of 64 floats
    scheduler = scheduler_of(model, prefix_bytes=3 * size)
    for n in range(6):
        Asked(scheduler, [n + 3, *range(3, 90), *range(3, 90)], 1).result()
    kept = [prefix.size for _, prefix in scheduler._prefixes._kept]
    assert kept == [size] * 3


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_a_short_prompt_does_not_wait_for_a_long_one_or_a_long_reply(demo: Any) -> None:
    scheduler = scheduler_of(demo)
    long_reply = Asked(scheduler, [5, 6, 7], 900)
    assert long_reply.begun.wait(60)
    long_prompt = Asked(scheduler, [(i * 7) % 4000 + 3 for i in range(900)], 2)
    short = Asked(scheduler, [9, 10, 11], 2)
    short.result()
    assert not long_prompt.begun.is_set() and not long_reply.finished.is_set()
    long_prompt.result()
    assert not long_reply.finished.is_set()
    long_reply.gone = True
    long_reply.result()


def test_more_than_fit_wait_and_a_gone_client_gives_its_place(demo: Any) -> None:
    scheduler = scheduler_of(demo, most=2)
    first, second = Asked(scheduler, [5, 6], 1000), Asked(scheduler, [7, 8], 1000)
    assert first.begun.wait(60) and second.begun.wait(60)
    third = Asked(scheduler, [9, 10], 3)
    time.sleep(0.1)
    assert scheduler.waiting == 1 and scheduler.running == 2 and not third.begun.is_set()
    first.gone = True
    assert len(third.result()) == 3
    assert not second.finished.is_set()
    second.gone = True
    second.result()


def test_a_call_waits_for_replies_before_it_and_later_ones_wait_for_it(demo: Any) -> None:
    scheduler = scheduler_of(demo)
    order: list[str] = []
    before = [Asked(scheduler, ids, 20) for ids in prompts(3, 4096)]
    call = scheduler.submit(lambda: order.append("call" if all(one.finished.is_set() for one in before) else "early"))
    after = Asked(scheduler, [5, 6, 7], 4)
    assert len(after.result()) == 4
    assert call.done() and order == ["call"]
    with pytest.raises(ZeroDivisionError):
        scheduler.submit(lambda: 1 // 0).result()
    assert len(Asked(scheduler, [5, 6], 2).result()) == 2  # the thread goes on


def test_lengths_that_differ_much_do_not_share_memory(demo: Any) -> None:
    """The cache of a batch has the length of its longest row for each row."""
    scheduler = scheduler_of(demo)
    long = Asked(scheduler, [(i * 7) % 4000 + 3 for i in range(800)], 200)
    assert long.begun.wait(60)
    short = [Asked(scheduler, [n, n + 1], 40) for n in range(5, 9)]
    assert short[-1].begun.wait(60)
    sizes = [(len(group.rows), group.batch.columns) for group in list(scheduler._running)]
    long.gone = True
    assert len(sizes) == 2 and all(columns < 100 for rows, columns in sizes if rows > 1)
    assert all(len(one.result()) == 40 for one in short)


def test_an_error_ends_its_own_reply_only(demo: Any) -> None:
    def broken() -> Callable[..., Any]:
        def rule(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] > 5:
                raise RuntimeError("this rule is broken")
            return scores

        return rule

    scheduler = scheduler_of(demo)
    good = Asked(scheduler, [5, 6, 7], 20)
    bad = Asked(scheduler, [5, 6, 8], 20, rules=[broken])
    assert len(good.result()) == 20
    with pytest.raises(RuntimeError, match="this rule is broken"):
        bad.result()
    assert len(bad.tokens) == 3


def test_a_step_that_fails_ends_its_replies_and_nothing_else(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if memory had run out in a step, and in joining a batch."""
    scheduler = scheduler_of(demo)
    step, join = Stepper.step, Batch.join

    def failing(self: Stepper, batch: Batch, tokens: list[int]) -> torch.Tensor:
        if len(tokens) == 2:
            raise MemoryError("no memory for a step")
        return step(self, batch, tokens)

    monkeypatch.setattr(Stepper, "step", failing)
    both = [Asked(scheduler, ids, 900) for ids in ([5, 6, 7], [5, 6, 8])]
    for one in both:
        with pytest.raises(MemoryError, match="a step"):
            one.result()
    monkeypatch.setattr(Stepper, "step", step)

    def full(self: Batch, cache: Any) -> None:
        raise MemoryError("no memory for a batch")

    monkeypatch.setattr(Batch, "join", full)
    first = Asked(scheduler, [5, 6, 7], 30)
    assert first.begun.wait(60)
    second = Asked(scheduler, [5, 6, 8], 30)
    with pytest.raises(MemoryError, match="a batch"):
        second.result()
    monkeypatch.setattr(Batch, "join", join)
    assert len(first.result()) == 30 and scheduler.running == 0
    assert len(Asked(scheduler, [5, 6, 7], 3).result()) == 3

    class Gone(Asked):
        def _done(self, error: Exception | None) -> None:
            raise RuntimeError("Event loop is closed")

    Gone(scheduler, [5, 6], 2)
    assert len(Asked(scheduler, [5, 6, 7], 3).result()) == 3


@pytest.mark.parametrize("most", [8, 1])
def test_beams_and_log_probabilities(demo: Any, most: int) -> None:
    """Alone and in a batch: beam search is always alone; the log probabilities are the model's."""
    scheduler = scheduler_of(demo, most=most)
    assert (scheduler.alone is None) == (most > 1)
    beside = Asked(scheduler, [5, 6, 7], 8)
    beams = Asked(scheduler, [9, 10, 11], 6, settings={"num_beams": 3, "eos_token_id": [4095], "pad_token_id": 2})
    assert not beams.job.joins and beside.job.joins
    watched = Asked(scheduler, [5, 6, 7], 8, chances=2)
    expected = demo.generate(
        torch.tensor([[9, 10, 11]]), attention_mask=torch.ones(1, 3), num_beams=3, max_new_tokens=6,
        eos_token_id=[4095], pad_token_id=2,
    )  # fmt: skip
    assert beams.result() == expected[0, 3:].tolist()
    assert watched.result() == beside.result()
    said = list(watched.streamer.said)
    assert [one.token for one in said] == watched.tokens
    for place, one in enumerate(said):
        with torch.no_grad():
            scores = demo(torch.tensor([[5, 6, 7, *watched.tokens[:place]]])).logits[0, -1].log_softmax(-1)
        assert one.likeliest[0][0] == one.token and len(one.likeliest) == 2
        assert one.logprob == pytest.approx(float(scores[one.token]), abs=0.05)  # other kernels for other shapes
