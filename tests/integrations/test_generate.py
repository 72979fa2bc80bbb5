"""`generate` of transformers on quantized models: every way of decoding gives the text of the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import state_bytes
from torch import Tensor

import isqtorch
from isqtorch.inplace.quantize import quantize_
from isqtorch.modules import QuantLinear

transformers = pytest.importorskip("transformers", "5.23")

DEMO = Path(__file__).resolve().parents[2] / "examples/demo_model/model"
NEW = 16


def deferred(fmt: str) -> Any:
    """The demo model, loaded and then quantized."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    quantize_(model, fmt)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return deferred("q4k")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    text = (DEMO.parent / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:4000]).input_ids
    return [ids[:20], ids[100:107], ids[200:231], ids[300:303]]


@pytest.fixture(scope="module")
def prompt(prompts: list[list[int]]) -> Tensor:
    return torch.tensor([prompts[0]])


def tokens(model: Any, prompt: Tensor, **options: Any) -> list[int]:
    torch.manual_seed(3)
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 2, **options}
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return out[0, prompt.shape[1] :].tolist()


def check_greedy(model: Any, prompt: Tensor, text: list[int]) -> None:
    """Every token is the most likely one, as far as kernels for few and for many rows agree (1 % of a logit's size)."""
    with torch.no_grad():
        logits = model(torch.cat([prompt, torch.tensor([text])], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits[torch.arange(len(text)), text]
    near = (logits.amax(-1) - chosen) <= 0.1 * logits.std(-1)
    assert len(text) == NEW and near.all(), (text, logits.argmax(-1).tolist())


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20}
both = pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])


def test_eager(model: Any, prompt: Tensor) -> None:
    text = tokens(model, prompt)
    assert len(set(text)) > 6
    check_greedy(model, prompt, text)
    with pytest.raises(AssertionError):
        check_greedy(deferred("q2k"), prompt, text)  # the check can tell models apart
    sampled = tokens(model, prompt, **SAMPLED)
    assert sampled == tokens(model, prompt, **SAMPLED) != text


@pytest.mark.parametrize("fmt", ["q8_0", "q4k", "afq4", "hqq4", "fp8"])
def test_quantized_while_loading_says_the_same(fmt: str, prompt: Tensor, tmp_path: Path) -> None:
    want = deferred(fmt)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO, quantization_config=isqtorch.IsqConfig(fmt), dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for options in ({}, SAMPLED):
        text = tokens(want, prompt, **options)
        assert tokens(loaded, prompt, **options) == text and tokens(again, prompt, **options) == text


@both
def test_static_cache(model: Any, prompt: Tensor, options: dict[str, Any]) -> None:
    assert tokens(model, prompt, cache_implementation="static", **options) == tokens(model, prompt, **options)


def test_padded_batch(model: Any, prompts: list[list[int]]) -> None:
    width = max(map(len, prompts))
    rows = torch.tensor([[2] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    out = model.generate(
        rows, attention_mask=mask, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=2
    )
    for ids, row in zip(prompts, out[:, width:].tolist(), strict=True):
        check_greedy(model, torch.tensor([ids]), row)


def test_beams(model: Any, prompt: Tensor) -> None:
    """The best of several beams is at least as likely as the greedy text."""

    def likelihood(text: list[int]) -> float:
        ids = torch.cat([prompt, torch.tensor([text])], dim=1)
        with torch.no_grad():
            log_p = model(ids).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        return float(log_p[torch.arange(len(text)), text].sum())

    assert likelihood(tokens(model, prompt, num_beams=4)) >= likelihood(tokens(model, prompt)) - 0.05


@pytest.mark.slow  # the compiler takes a minute
@both
def test_compiled_into_one_graph(model: Any, prompt: Tensor, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    config = transformers.CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # otherwise generate compiles on accelerators only
    compiled = deferred("q4k")
    assert compiled.hf_quantizer.is_compileable
    text = tokens(compiled, prompt, cache_implementation="static", compile_config=config, **options)
    assert text == tokens(model, prompt, **options)
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1 and not torch._dynamo.utils.counters["graph_break"]
    )
    assert all(type(m) is QuantLinear for n, m in compiled.named_modules() if n.endswith("_proj"))


def test_continuous_batching(model: Any, prompts: list[list[int]]) -> None:
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=2, eos_token_id=1
    )
    cache = transformers.generation.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    attention = model.config._attn_implementation
    try:
        results = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=cache, progress_bar=False
        )
    finally:
        model.set_attn_implementation(attention)
    texts = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    assert texts.keys() == {tuple(ids) for ids in prompts}
    for ids, text in texts.items():
        check_greedy(model, torch.tensor([ids]), text)


@pytest.mark.parametrize("draft_format", ["q2k", "q8_0"])
def test_assisted_by_a_quantized_draft(model: Any, prompt: Tensor, draft_format: str) -> None:
    """What the draft proposes changes how fast it goes, not the text."""
    check_greedy(model, prompt, tokens(model, prompt, assistant_model=deferred(draft_format)))


def test_assisted_sampling_is_seeded(model: Any, prompt: Tensor) -> None:
    draft = deferred("q2k")
    text = tokens(model, prompt, assistant_model=draft, **SAMPLED)
    assert len(text) == NEW and text == tokens(model, prompt, assistant_model=draft, **SAMPLED)


def test_prompt_lookup(model: Any, prompt: Tensor) -> None:
    prompt = prompt.repeat(1, 3)
    check_greedy(model, prompt, tokens(model, prompt, prompt_lookup_num_tokens=3))


def test_loaded_and_deferred_have_the_same_bytes() -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        DEMO, quantization_config=isqtorch.IsqConfig("q4k"), dtype=torch.float32
    )
    assert state_bytes(loaded) == state_bytes(deferred("q4k"))
