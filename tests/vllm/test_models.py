"""Small random models of other architectures: saved packed, and packed while vLLM loads them; the tokens of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_decoders import tiny
from vllm_engine import Answer, ask_vllm, assert_same_tokens, case, difference, online, transformers_answer

import isqtorch

pytestmark = pytest.mark.timeout(3600)  # the first test waits for all models

PROMPTS = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 17, 40)]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 512}
ROUTED = {"moe_intermediate_size": 256}
EXPERTS, TABLE, HEAD, LINEAR = "IsqExpertsMethod", "IsqTableMethod", "IsqHeadMethod", "IsqLinearMethod"
# What vLLM asks plug-ins about in each model. Gemma and Mixtral do not ask about their tables.
MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "qwen2": (WIDE, {LINEAR, TABLE, HEAD}),
    "qwen3": ({**WIDE, "tie_word_embeddings": True}, {LINEAR, TABLE}),
    "gemma": (WIDE, {LINEAR}),
    "mixtral": (WIDE, {LINEAR, HEAD, EXPERTS}),
    "qwen3_moe": ({**WIDE, **ROUTED}, {LINEAR, TABLE, HEAD, EXPERTS}),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Of transformers under "... saved" and "... online", of vLLM under "... saved in vLLM" and "... online in vLLM"."""
    from transformers import AutoModelForCausalLM

    found: dict[str, Answer] = {}
    cases: dict[str, dict[str, Any]] = {}
    for name, (changes, methods) in MODELS.items():
        floats, packed = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-packed")
        model = tiny(name, **changes)
        model.get_output_embeddings().weight.data.mul_(0.1)  # so that there are several likely tokens
        model.save_pretrained(floats)
        model = AutoModelForCausalLM.from_pretrained(floats, quantization_config=isqtorch.IsqConfig("q4k_m"))
        model.save_pretrained(packed)
        found[f"{name} saved"] = found[f"{name} online"] = transformers_answer(model, PROMPTS)
        if TABLE not in methods:  # packed in the folder, but float if vLLM packs the model
            request = isqtorch.IsqConfig("q4k_m", exclude="embed_tokens")
            model = AutoModelForCausalLM.from_pretrained(floats, quantization_config=request)
            found[f"{name} online"] = transformers_answer(model, PROMPTS)
        cases[f"{name} saved in vLLM"] = case(packed, PROMPTS, skip_tokenizer_init=True)
        cases[f"{name} online in vLLM"] = case(floats, PROMPTS, skip_tokenizer_init=True, **online("q4k_m"))
    return {**found, **dict(zip(cases, ask_vllm(list(cases.values())), strict=True))}


@pytest.mark.parametrize("way", ["saved", "online"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name: str, way: str, answers: dict[str, Answer]) -> None:
    found, expected = answers[f"{name} {way} in vLLM"], answers[f"{name} {way}"]
    assert found.methods() == MODELS[name][1]
    assert_same_tokens(found, expected)
    assert difference(found, expected) < 0.02


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_vllm_does_not_ask_about_are_said(name: str, answers: dict[str, Answer]) -> None:
    silent = TABLE not in MODELS[name][1]
    assert (
        "asks no plug-in about model.embed_tokens, which the checkpoint has packed"
        in answers[f"{name} saved in vLLM"].log
    ) is silent
    assert ("asks no plug-in about model.embed_tokens" in answers[f"{name} online in vLLM"].log) is silent


@pytest.mark.parametrize("name", MODELS)
def test_one_float_layer_at_a_time(name: str, answers: dict[str, Answer]) -> None:
    largest = 4 * 256 * 256 * 3 * (4 if EXPERTS in MODELS[name][1] else 1)  # float32: all experts of a layer, or an MLP
    assert 0 < answers[f"{name} online in vLLM"].peak <= largest
