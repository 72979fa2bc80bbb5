"""Packed models spread over two processes on the CPU, by transformers' own means: tensor, expert and fully sharded parallelism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama
from torch import nn
from two_processes import run_two

import isqtorch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

WORKER = Path(__file__).with_name("parallel_worker.py")
ROUNDING = 1e-3  # of f32 sums that are split in two, after two layers and a head
MIXED = 0.02  # of the same in bf16
since_2_12 = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="older: FSDP2 refuses bytes, and DTensors cannot put merged gates together"
)


def tiny_qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config).eval()


def write_checkpoints(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama = tiny_llama(dtype=torch.float32)
    llama.save_pretrained(folder / "llama")
    linears = {name: m.in_features for name, m in llama.named_modules() if type(m) is nn.Linear}
    generator = torch.Generator().manual_seed(1)
    importance = {name: torch.rand(columns, generator=generator) for name, columns in linears.items()}
    torch.save(importance, folder / "importance.pt")
    tiny_qwen3_moe().save_pretrained(folder / "moe")
    for name, source, fmt in (
        ("llama-packed", "llama", "q8_0"),
        ("llama-q4k", "llama", "q4k"),
        ("moe-packed", "moe", "q8_0"),
    ):
        packed = AutoModelForCausalLM.from_pretrained(folder / source, quantization_config=isqtorch.IsqConfig(fmt))
        packed.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes wrote, by rank. Starting them takes longer than all they do, so they are started once."""
    folder = tmp_path_factory.mktemp("parallel")
    write_checkpoints(folder)
    run_two(WORKER, str(folder), timeout=600)
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


def both(results: list[dict[str, Any]], scenario: str) -> list[dict[str, Any]]:
    return [result[scenario] for result in results]


def test_tensor_parallel_packs_each_process_its_share(results: list[dict[str, Any]]) -> None:
    for result in both(results, "tensor parallel"):
        assert result["distance"] < ROUNDING
        assert result["tokens"][0] == result["tokens"][1]
        assert result["same bytes"]
        assert result["share"] == 0.5
        assert result["saved"]


def test_a_packed_checkpoint_is_spread(results: list[dict[str, Any]]) -> None:
    for result in both(results, "tensor parallel, packed"):
        assert result["distance"] < ROUNDING
        assert result["same bytes"]


def test_importance_is_cut_as_the_columns_are(results: list[dict[str, Any]]) -> None:
    assert all(result["same bytes"] for result in both(results, "tensor parallel, importance"))


def test_a_cut_inside_a_block_stops_every_process(results: list[dict[str, Any]]) -> None:
    expected = (
        "isq: model.layers.0.self_attn.o_proj is q4k with 256 columns, which cannot be cut into 2 equal pieces of whole blocks of "
        "256. Give this layer a format with smaller blocks by a topology entry, use another tp_size, or 'replicate' it in the "
        "tp_plan."
    )
    for result in both(results, "cut blocks"):
        assert result["messages"] == [expected] * 2


def test_fully_sharded_by_an_old_torch(results: list[dict[str, Any]]) -> None:
    expected = (
        f"isq: packed weights over 2 processes by FSDP2 need torch >= 99.0, this is {torch.__version__}, which refuses parameters of "
        "bytes. Update torch, or use tp_size."
    )
    for result in both(results, "fully sharded, old torch"):
        assert result["messages"] == [expected] * 2


@since_2_12
def test_fully_sharded(results: list[dict[str, Any]]) -> None:
    for result in both(results, "fully sharded"):
        assert result["distance"] == 0.0
        assert result["share"] == 0.5
        assert result["mixed"] < MIXED


@since_2_12
def test_adapters_train_on_spread_layers(results: list[dict[str, Any]]) -> None:
    pytest.importorskip("peft")
    assert all(result["distance"] < ROUNDING for result in both(results, "fully sharded, training"))


@pytest.mark.parametrize(
    "scenario", [pytest.param("experts, tensor parallel", marks=since_2_12), "experts, expert parallel"]
)
def test_experts_are_spread(results: list[dict[str, Any]], scenario: str) -> None:
    for result in both(results, scenario):
        assert result["distance"] < ROUNDING
        assert result["tokens"][0] == result["tokens"][1]
        assert result["same bytes"]
        assert result["packed"] < ROUNDING
        assert result["share"] == 0.5


def test_the_example_in_the_guide() -> None:
    root = Path(__file__).resolve().parents[2]
    text = run_two(
        root / "examples" / "tensor_parallel.py",
        str(root / "examples" / "demo_model" / "model"),
        "q8_0",
        "Return a new",
        timeout=200,
    )
    _, prompt, reply = text.partition("Return a new")  # gloo of older versions of torch prints before it
    assert prompt and len(reply.split()) > 7
