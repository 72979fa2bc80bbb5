"""`optimize_`: says what it does on each device, and goes back. What it does on a CPU: test_decoding.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny_gpt2, tiny_llama
from torch import nn

import isqtorch
from isqtorch.integrations import generation

pytest.importorskip("transformers", "5.23")

PROMPT = torch.arange(3, 12)[None]


@pytest.fixture
def model() -> Any:
    model = tiny_llama(dtype=torch.float32)
    isqtorch.quantize_(model, "q4k")
    return model


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would do on a GPU; the model stays on the CPU."""
    monkeypatch.setattr(generation, "_devices", lambda model: ["cuda:0"])


def reply(model: Any) -> list[int]:
    out = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return out[0].tolist()


def settings(model: Any) -> dict[str, Any]:
    return {name: getattr(model.generation_config, name) for name in ("cache_implementation", "compile_config")}


def test_on_a_cpu_layers_compute_with_few_operators_and_it_says_so(model: Any) -> None:
    before, text = settings(model), reply(model)
    done = isqtorch.optimize_(model)
    assert settings(model) == before and done.changes == {} and done.layers == 2
    assert str(done).startswith(
        "cpu: decoder layers that compute a token with few operators: 2, with the bits of torch"
    )
    assert reply(model) == text


def test_on_cuda_a_static_cache_and_one_graph_with_the_same_text(model: Any, on_cuda: None) -> None:
    before, text = settings(model), reply(model)
    done = isqtorch.optimize_(model)
    assert settings(model) == done.changes
    assert done.changes["cache_implementation"] == "static"
    config = done.changes["compile_config"]
    assert config.fullgraph and config.mode == "reduce-overhead"
    assert str(done).startswith("cuda: cache_implementation='static', compile_config=")
    config.backend, config.mode, config._compile_all_devices = "eager", None, True  # traces, but compiles nothing
    assert reply(model) == text
    assert isqtorch.optimize_(model, False).changes == {}
    assert settings(model) == before and reply(model) == text


def test_twice_is_once(model: Any, on_cuda: None) -> None:
    before = settings(model)
    isqtorch.optimize_(model)
    isqtorch.optimize_(model)
    isqtorch.optimize_(model, False)
    assert settings(model) == before
    isqtorch.optimize_(model, False)
    assert settings(model) == before


def test_own_settings_come_back(model: Any, on_cuda: None) -> None:
    model.generation_config.cache_implementation = "quantized"
    isqtorch.optimize_(model)
    isqtorch.optimize_(model, False)
    assert model.generation_config.cache_implementation == "quantized"


def test_it_is_not_saved_with_the_model(model: Any, on_cuda: None) -> None:
    names = set(model.state_dict())
    isqtorch.optimize_(model)
    assert set(model.state_dict()) == names


def test_models_it_is_not_for(model: Any, on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="optimize_: Linear is no transformers model that can generate"):
        isqtorch.optimize_(nn.Linear(2, 2))
    gpt2 = tiny_gpt2()
    gpt2._can_compile_fullgraph = False
    with pytest.raises(ValueError, match="transformers cannot compile GPT2LMHeadModel with a static cache"):
        isqtorch.optimize_(gpt2)
    monkeypatch.setattr(generation, "_devices", lambda model: ["cuda:0", "cuda:1"])
    with pytest.raises(ValueError, match="the model is on cuda:0, cuda:1; one CUDA graph needs one device"):
        isqtorch.optimize_(model)


def test_tokens_per_second_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark for GPUs, with a model that is small enough for a CPU."""
    from benchmarks.cuda import generate

    def speed(model: Any) -> float:
        return 2.0 if model.state_dict()["lm_head.weight"].dtype == torch.uint8 else 1.0

    monkeypatch.setattr(generate, "tokens_per_second", speed)
    small = {"layers": 1, "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    skipped: list[str] = []
    found = generate.measure("cpu", ["q4k"], 1e12, skipped, num_key_value_heads=2, **small)
    assert found == {"bf16": 1.0, "q4k": 2.0} and not skipped
    assert generate.measure("cpu", ["q4k"], 0.0, skipped, **small) == {}
    assert skipped == ["generate bf16: no time left", "generate q4k: no time left"]


def test_speed_is_that_of_the_best_reply_after_the_first(model: Any) -> None:
    from benchmarks.cuda import generate

    assert generate.tokens_per_second(model, prompt=4, new=3, repeats=1) > 0
