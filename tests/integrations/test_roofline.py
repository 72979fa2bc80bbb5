"""`isqtorch bench --roofline`: what a token reads, and where its time goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.23")

from gguf_models import tiny_model

import isqtorch
from isqtorch.app.roofline import PARTS, Roofline, _part, bytes_of_token, lines, measure_roofline
from isqtorch.cli import main

DEMO = str(Path(__file__).resolve().parents[2] / "examples/demo_model/model")
TOKENS = 20


def measured(model: Any, kv: str | None = None) -> Roofline:
    ids = torch.arange(3, 3 + TOKENS)[None]

    def cache() -> dict[str, Any]:
        return {} if kv is None else {"cache": isqtorch.QuantizedCache(model.config, kv)}

    return measure_roofline(model, ids, 0.05, cache)


def linears(model: Any) -> int:
    """Bytes of all linear layers; the head too, if it is the token table."""
    kinds = (torch.nn.Linear, isqtorch.QuantLinear)
    return sum(module.weight.nbytes for module in model.modules() if isinstance(module, kinds))


@pytest.mark.parametrize("isq", [None, "q8_0", "q4_0"])
@pytest.mark.parametrize("kv", [None, "q8_0"])
def test_bytes_are_exact_and_parts_make_up_the_token(isq: str | None, kv: str | None) -> None:
    model = tiny_model("llama")
    if isq is not None:
        isqtorch.quantize_(model, isq, progress=False)
    found = measured(model, kv)
    assert found.weight_bytes == linears(model)
    config = model.config
    row = config.head_dim * 4 if kv is None else config.head_dim // 32 * 34
    steps = found.cache_bytes / (2 * config.num_hidden_layers * config.num_key_value_heads * row)
    assert steps == int(steps) and TOKENS < steps <= TOKENS + 20  # a whole number of tokens, the steps before included
    assert found.bandwidth > 0 and found.threads == torch.get_num_threads()
    assert list(found.parts) == list(PARTS) and all(seconds >= 0 for seconds in found.parts.values())
    assert found.parts["products"] > 0 and found.parts["attention"] > 0
    assert sum(found.parts.values()) == pytest.approx(found.token_seconds) == 0.05
    assert found.token_share == pytest.approx((found.weight_bytes + found.cache_bytes) / found.bandwidth / 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_a_model_with_few_operators_reads_the_same(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    isqtorch.quantize_(model, "q8_0", fallback="skip", progress=False)
    ids = torch.arange(3, 3 + TOKENS)[None]
    usual = bytes_of_token(model, ids)
    done = isqtorch.optimize_(model)
    assert done.layers == model.config.num_hidden_layers
    assert bytes_of_token(model, ids) == usual and min(usual) > 0
    parts = measured(model).parts
    assert parts["attention"] > 0 and parts["keys and values"] > 0  # both are operators of a step now


def test_every_operator_of_a_step_is_a_part() -> None:
    every = (name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("isqtorch::"))
    halves = {"step_attention", "step_mlp"}  # several parts each: a profile calls these one by one
    names = [name for name in every if name.startswith("step_") and name not in halves]
    found = {name: _part(f"isqtorch::{name}") for name in names}
    assert found == {
        "step_attend": "attention",
        "step_gate": "other operators",
        "step_heads": "keys and values",
        "step_linear_add": "products",
        "step_linears": "products",
        "step_norm": "other operators",
    }


def test_experts_that_a_token_does_not_use_are_not_counted() -> None:
    model = tiny_model("qwen3_moe")
    isqtorch.quantize_(model, "q8_0", fallback="skip", progress=False)
    stacks = [m for m in model.modules() if isinstance(m, isqtorch.QuantExperts)]
    assert stacks
    found = measured(model)
    whole = sum(p.nbytes for stack in stacks for p in stack.parameters())
    used = model.config.num_experts_per_tok / model.config.num_experts
    routers = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert found.weight_bytes == linears(model) + routers + whole * used


def test_the_table_says_all() -> None:
    parts = dict(zip(PARTS, (0.5, 0.1, 0.1, 0.1, 0.1, 0.1), strict=True))
    text = "\n".join(lines(Roofline(2, 20e9, 5_000_000_000, 1_000_000_000, 1.0, parts).to_dict()))
    assert "reads 5000.0 MB of weights and 1000.0 MB of keys and values; memory gives 20.0 GB/s to 2 threads" in text
    assert "30 % of the speed of memory; the products alone 50 %" in text
    assert "products           500.00 ms  50.0 %" in text and all(name in text for name in PARTS)


def test_bench_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--prompt-len", "8", "--gen-len", "3", "--repeat", "1", "--roofline", "--in-process", "--no-baseline"]
    assert main(["bench", "-m", DEMO, "--isq", "q4k", "--kv", "q8_0", "--json", *few]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert set(row["roofline"]["parts"]) == set(PARTS) and row["roofline"]["weight_bytes"] > 4e6
    assert main(["bench", "-m", DEMO, "--isq", "q4k", *few]) == 0
    assert "of the speed of memory" in capsys.readouterr().out
    assert main(["bench", "-m", DEMO, "--roofline", "--device", "cuda"]) == 1
    assert "--roofline knows CPUs" in capsys.readouterr().err
