"""GGUF files of many architectures: the packed model has the blocks of the file, and is transformers' decoded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights

import isqtorch
from isqtorch.integrations.checkpoints.assemble import assemble
from isqtorch.integrations.checkpoints.gguf.checkpoint import GgufCheckpoint
from tests.integrations.gguf_models import logits, stock, tiny_model, write_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 9, 60]])


def opened(path: Path) -> tuple[Any, Any]:
    """The packed model, and the report."""
    checkpoint = GgufCheckpoint(path)
    config = checkpoint.config()
    with init_empty_weights():
        model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32).eval()
    return model, assemble(model, checkpoint, None, CPU)


def decoded(model: Any) -> dict[str, torch.Tensor]:
    """The state dict with all weights decoded. The model is changed."""
    isqtorch.dequantize_(model)
    return dict(model.state_dict())


def mixed(name: str) -> str:
    """Formats as llama.cpp mixes them in q4k_m."""
    if name in ("token_embd.weight", "output.weight"):
        return "q6k"
    return "q6k" if "attn_v" in name or "ffn_down" in name else "q4k"


# Those that transformers can read as well. It differs on purpose where `test_gguf_differences` says so.
COMMON = [
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "qwen2_moe", "qwen3_moe", "gpt2", "starcoder2", "stablelm", "bloom",
    "nemotron", "mamba", "minimax_m2", "umt5", "lfm2", "qwen3_5_text", "qwen3_5_moe_text",
]  # fmt: skip


# transformers has no place for the head of an untied Gemma 2, and opens Bloom and T5 as tied.
UNTIED = [kind for kind in COMMON if kind != "gemma2"]


@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, False) for kind in UNTIED), *((kind, True) for kind in COMMON)], ids=str
)
def test_the_packed_model_is_the_one_that_transformers_decodes(kind: str, tied: bool, tmp_path: Path) -> None:
    path = write_model(tmp_path / f"{kind}.gguf", tiny_model(kind, tie_word_embeddings=tied), mixed)
    packed, report = opened(path)
    expected = stock(path)
    assert packed.config.model_type == expected.config.model_type
    assert report.layers and not any("no place" in note for note in report.notes)
    with_kernels = logits(packed, IDS)
    weights = decoded(packed)
    assert weights.keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        anew = "columns" in report[name.removesuffix(".weight")].reason if name.endswith("out_proj.weight") else False
        assert float((weights[name] - weight).norm()) <= (0.1 if anew else 0) * float(weight.norm()), name
    exact = logits(expected, IDS)
    packed.load_state_dict(expected.state_dict())  # changes only what was packed anew
    assert torch.equal(logits(packed, IDS), exact)
    assert float((with_kernels - exact).norm() / exact.norm()) < 0.08


# Those that transformers cannot open, or opens as something else: compared with the model that was written.
OWN = [
    "llama", "mistral", "mixtral", "gemma", "gemma2", "phi", "gpt_oss", "falcon", "granite", "granitemoe", "smollm3", "arcee",
    "ministral3", "seed_oss", "ernie4_5", "olmo", "olmo2", "olmoe", "cohere", "cohere2", "glm", "glm4", "gpt_neox", "t5", "falcon_mamba",
    "qwen2_moe", "qwen3_moe", "stablelm", "lfm2", "qwen3_5_text", "qwen3_5_moe_text", "deepseek_v2", "deepseek_v3",
    "glm4_moe", "dots1", "gemma4_text", "exaone4", "olmo3", "ernie4_5_moe", "lfm2_moe",
    "gpt_bigcode", "hunyuan_v1_dense",
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "qwen2_moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    "qwen3_moe": {"moe_intermediate_size": 512, "head_dim": 64},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": False},
}


# Other models of the same architectures.
MORE: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "num_hidden_layers": 2, "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "hidden_size_per_layer_input": 0,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 256, "attention_k_eq_v": True,
        "num_global_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"],
    },
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 4},
    "phi3": {"partial_rotary_factor": 0.5},
    "t5": {"feed_forward_proj": "relu"},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "lfm2": {"layer_types": ["full_attention", "conv"], "conv_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*OWN, *(f"{kind} too" for kind in MORE)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_packed_model_is_the_one_that_was_written(kind: str, tied: bool, tmp_path: Path) -> None:
    kind, _, more = kind.partition(" ")
    model = tiny_model(kind, tie_word_embeddings=tied, **(MORE if more else OPTIONS).get(kind, {}))
    path = write_model(tmp_path / f"{kind}.gguf", model, mixed)
    packed, _ = opened(path)
    expected = dict(model.state_dict())
    with_kernels = logits(packed, IDS)
    for name, weight in decoded(packed).items():
        fits = weight.shape == expected[name].shape
        assert fits and float((weight - expected[name]).norm() / expected[name].norm()) < 0.13, name
    model.load_state_dict(packed.state_dict())
    exact = logits(model, IDS)
    assert torch.equal(logits(packed, IDS), exact)
    assert float((with_kernels - exact).norm() / exact.norm()) < 0.1
