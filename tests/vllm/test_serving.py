"""vLLM with two processes, adapters, compilation, and its server, on models with packed layers."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_demo import TEXTS
from test_models import PROMPTS, ROUTED, WIDE
from tiny_decoders import tiny
from vllm_engine import (
    DEMO,
    NEW,
    Answer,
    ask_vllm,
    assert_same_tokens,
    case,
    difference,
    environment,
    python,
    transformers_answer,
)

import isqtorch

pytestmark = pytest.mark.timeout(3600)  # the first test waits for all models


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in q4k_m: q, k and v of several formats, and a tied table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("demo")
    model = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=isqtorch.IsqConfig("q4k_m"))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def expected(demo: Path, prompts: list[list[int]]) -> Answer:
    from transformers import AutoModelForCausalLM

    return transformers_answer(AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32), prompts)


@pytest.fixture(scope="module")
def shared(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, Answer]]:
    """Two processes that share each layer, or the experts: what vLLM answers, and what transformers does.

    All formats have blocks of 32, so that the columns can be shared, too.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, routed = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("routed")
    request = isqtorch.IsqConfig("q8_0", topology={"/v_proj/": "q5_0"})
    AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=request).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    experts = tiny("qwen3_moe", **WIDE, **ROUTED)
    experts.get_output_embeddings().weight.data.mul_(0.1)
    isqtorch.quantize_(experts, "q8_0")
    experts.save_pretrained(routed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = {"layers": transformers_answer(model, prompts), "experts": transformers_answer(experts, PROMPTS)}
    expected["whole experts"] = expected["experts"]
    moe = {"skip_tokenizer_init": True, "tensor_parallel_size": 2}
    found = ask_vllm(
        [
            case(folder, prompts, tensor_parallel_size=2),
            case(routed, PROMPTS, **moe),
            case(routed, PROMPTS, enable_expert_parallel=True, **moe),
        ],
        processes=2,
    )
    return {name: (answer, expected[name]) for name, answer in zip(expected, found, strict=True)}


@pytest.mark.parametrize("what", ["layers", "experts", "whole experts"])
def test_two_processes(what: str, shared: dict[str, tuple[Answer, Answer]]) -> None:
    found, expected = shared[what]
    assert_same_tokens(found, expected)
    assert difference(found, expected) < 0.02


def test_compiled(demo: Path, prompts: list[list[int]], expected: Answer) -> None:
    [found] = ask_vllm([case(demo, prompts, enforce_eager=False)])
    assert_same_tokens(found, expected)


def test_an_adapter(demo: Path, prompts: list[list[int]], expected: Answer, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / (5 if "lora_B" in name else 28))
    adapted.save_pretrained(tmp_path)
    other = transformers_answer(adapted.eval(), prompts)
    [found] = ask_vllm([case(demo, prompts, enable_lora=True, max_lora_rank=8, adapter=str(tmp_path))])
    assert difference(other, expected) > 0.1, "the adapter changes the model"
    assert_same_tokens(found, other)
    assert found.tokens != expected.tokens


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of vLLM's server for a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python(),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--served-model-name",
        "demo",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=environment())
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, "vLLM's server has ended"
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_eight_requests_at_once(demo: Path, prompts: list[list[int]], expected: Answer) -> None:
    def completed(ids: list[int]) -> list[int]:
        body = {"model": "demo", "prompt": ids, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps({**body, "return_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            choice: dict[str, Any] = json.load(answer)["choices"][0]
        return choice["token_ids"]

    with served(demo) as address, ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(completed, [*prompts, *prompts]))
    for part in (tokens[: len(prompts)], tokens[len(prompts) :]):
        assert_same_tokens(Answer(part, [], [], {}), expected)
