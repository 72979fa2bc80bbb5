"""Small random models of other architectures: saved packed, and packed while vLLM loads them; the tokens of transformers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from tiny_decoders import tiny
from vllm_engine import Answer, ask_vllm, assert_same_tokens, case, difference, online, transformers_answer

import isqtorch

pytestmark = pytest.mark.timeout(3600)  # the first test waits for all models

PROMPTS = [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 17, 40)]
SIZES = {"hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 512}
WIDE = {**SIZES, "head_dim": 64}
ROUTED = {"moe_intermediate_size": 256}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False}  # fmt: skip
EXPERTS, TABLE, HEAD, LINEAR = "IsqExpertsMethod", "IsqTableMethod", "IsqHeadMethod", "IsqLinearMethod"


class Case(NamedTuple):
    """A model, what vLLM asks plug-ins about, and which packed layers it does not ask about."""

    changes: dict[str, Any]
    methods: set[str]
    silent: tuple[str, ...] = ()


MODELS = {
    "qwen2": Case(WIDE, {LINEAR, TABLE, HEAD}),
    "qwen3": Case({**WIDE, "tie_word_embeddings": True}, {LINEAR, TABLE}),
    "gemma": Case(WIDE, {LINEAR}, ("embed_tokens",)),
    "mixtral": Case(WIDE, {LINEAR, HEAD, EXPERTS}, ("embed_tokens",)),
    "qwen3_moe": Case({**WIDE, **ROUTED}, {LINEAR, TABLE, HEAD, EXPERTS}),
    # shared experts; experts that vLLM loads whole, with biases and an activation of their own
    "qwen2_moe": Case({**SIZES, **ROUTED, "shared_expert_intermediate_size": 256}, {LINEAR, TABLE, HEAD, EXPERTS}),
    "gpt_oss": Case({**WIDE, "rope_parameters": YARN}, {LINEAR, EXPERTS}, ("embed_tokens", "lm_head")),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Of transformers under "... saved" and "... online", of vLLM under "... saved in vLLM" and "... online in vLLM"."""
    from transformers import AutoModelForCausalLM

    found: dict[str, Answer] = {}
    cases: dict[str, dict[str, Any]] = {}
    for name, (changes, _, silent) in MODELS.items():
        floats, packed = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-packed")
        model = tiny(name, **changes)
        model.get_output_embeddings().weight.data.mul_(0.1)  # so that there are several likely tokens
        model.save_pretrained(floats)
        model = AutoModelForCausalLM.from_pretrained(floats, quantization_config=isqtorch.IsqConfig("q4k_m"))
        model.save_pretrained(packed)
        found[f"{name} saved"] = found[f"{name} online"] = transformers_answer(model, PROMPTS)
        if silent:  # packed in the folder, but float if vLLM packs the model
            request = isqtorch.IsqConfig("q4k_m", exclude=silent)
            model = AutoModelForCausalLM.from_pretrained(floats, quantization_config=request)
            found[f"{name} online"] = transformers_answer(model, PROMPTS)
        cases[f"{name} saved in vLLM"] = case(packed, PROMPTS, skip_tokenizer_init=True)
        cases[f"{name} online in vLLM"] = case(floats, PROMPTS, skip_tokenizer_init=True, **online("q4k_m"))
    return {**found, **dict(zip(cases, ask_vllm(list(cases.values())), strict=True))}


@pytest.mark.parametrize("way", ["saved", "online"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name: str, way: str, answers: dict[str, Answer]) -> None:
    found, expected = answers[f"{name} {way} in vLLM"], answers[f"{name} {way}"]
    assert found.methods() == MODELS[name].methods
    assert_same_tokens(found, expected)
    assert difference(found, expected) < 0.02


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_vllm_does_not_ask_about_are_said(name: str, answers: dict[str, Answer]) -> None:
    said = {way: answers[f"{name} {way} in vLLM"].log for way in ("saved", "online")}
    for layer in MODELS[name].silent:
        assert all(re.search(f"asks no plug-in about [^:]*{layer}", log) for log in said.values())
    assert ("which the checkpoint has packed: they are decoded" in said["saved"]) is bool(MODELS[name].silent)
    assert ("they stay float" in said["online"]) is bool(MODELS[name].silent)


@pytest.mark.parametrize("name", MODELS)
def test_one_float_layer_at_a_time(name: str, answers: dict[str, Answer]) -> None:
    # float32: all experts of a layer, or an MLP
    largest = 4 * 256 * 256 * 3 * (4 if EXPERTS in MODELS[name].methods else 1)
    biases = 2 * 4 * 4 * (512 + 256) if name == "gpt_oss" else 0  # of the experts of both layers: they are not packed
    assert 0 < answers[f"{name} online in vLLM"].peak <= largest + biases
