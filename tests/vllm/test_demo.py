"""What `save_pretrained` writes for the demo model by default is what vLLM loads: the same tokens as in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_engine import (
    DEMO,
    Answer,
    ask_vllm,
    assert_close,
    assert_same_tokens,
    case,
    difference,
    online,
    transformers_answer,
)

import isqtorch

pytestmark = pytest.mark.timeout(3600)  # the first test waits for all models

TEXTS = (
    "The function returns a list of",
    "Changed in version 3.8: The",
    "class Example(object):\n    def __init__(self",
    "To install the package, run",
)
# Mean difference of log-probabilities in bf16. The model that is not packed has 0.013, so most of it is not ours.
FORMATS = {"q4k": 0.035, "q8_0": 0.035, "afq4": 0.035, "fp8": 0.02, "hqq4": 0.035, "q4k_m": 0.035}
TABLE = 4096 * 256 * 4


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def answers(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Of transformers under the name of the format; of vLLM under "... float32", "... bfloat16" and "... online"."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found: dict[str, Answer] = {}
    cases: dict[str, dict[str, Any]] = {}
    for fmt in FORMATS:
        folder = tmp_path_factory.mktemp(fmt)
        model = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=isqtorch.IsqConfig(fmt))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
        found[fmt] = transformers_answer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompts)
        for dtype in ("float32", "bfloat16"):
            cases[f"{fmt} {dtype}"] = case(folder, prompts, dtype=dtype)
    for fmt in ("q4k", "q4k_m"):
        cases[f"{fmt} online"] = case(DEMO, prompts, **online(fmt))
    topology = {"/v_proj/": "q8_0", "/layers.0.mlp.gate_proj/": None}
    cases["topology online"] = case(DEMO, prompts, **online(4, topology=topology, exclude="o_proj"))
    request = isqtorch.IsqConfig(4, topology=topology, exclude="o_proj")
    asked = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=request, dtype=torch.float32)
    found["topology"] = transformers_answer(asked, prompts)
    return {**found, **dict(zip(cases, ask_vllm(list(cases.values())), strict=True))}


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_same_tokens_in_float32(fmt: str, answers: dict[str, Answer]) -> None:
    found, expected = answers[f"{fmt} float32"], answers[fmt]
    assert_same_tokens(found, expected)
    assert_close(found, expected)
    assert found.methods() == {"IsqLinearMethod", "IsqTableMethod"}, "the table is packed, and the head is the table"


@pytest.mark.parametrize("fmt", FORMATS)
def test_log_probabilities_in_bfloat16(fmt: str, answers: dict[str, Answer]) -> None:
    assert difference(answers[f"{fmt} bfloat16"], answers[fmt]) < FORMATS[fmt]


@pytest.mark.parametrize("fmt", ["q4k", "q4k_m", "topology"])
def test_packed_while_loading(fmt: str, answers: dict[str, Answer]) -> None:
    """The bytes are those of the saved model, and there is never more than one float layer."""
    found = answers[f"{fmt} online"]
    assert_same_tokens(found, answers[fmt])
    assert_close(found, answers[fmt])
    assert 0 < found.peak <= TABLE
    if fmt != "topology":
        weights = {name: sum(size for _, size in own.values()) for name, (_, own) in found.layers.items()}
        saved = answers[f"{fmt} float32"].layers
        assert weights == {name: sum(size for _, size in own.values()) for name, (_, own) in saved.items()}
    else:
        types = {kind for kind, _ in found.layers["model.layers.0.mlp.gate_up_proj"][1].values()}
        assert types == {"torch.float32", "torch.uint8"}
        assert found.layers["model.layers.0.self_attn.o_proj"][0] == "UnquantizedLinearMethod"
