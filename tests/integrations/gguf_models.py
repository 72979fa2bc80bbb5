"""Tiny models of many architectures as GGUF files, as llama.cpp's converter and quantizer would write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import isqtorch
from isqtorch.formats import get_format
from isqtorch.integrations.checkpoints.gguf.architectures import of_config
from isqtorch.integrations.checkpoints.gguf.layout import back
from isqtorch.integrations.checkpoints.gguf.rope import tensors_of
from isqtorch.modules.convert import layer_kind, matrices, upright
from tests.gguf_files import TYPES, f32, write

BASE = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_T5 = {"d_model": 256, "d_ff": 512, "d_kv": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
_LINEAR = {
    "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [6, 5, 5],
                        "mrope_interleaved": True},
}  # fmt: skip
_ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = _ROUTED | {
    "kv_lora_rank": 256, "q_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
                        "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 2, "n_head": 4, "max_position_embeddings": 1024},
    "bloom": {"hidden_size": 256, "n_layer": 2, "n_head": 4},
    "t5": _T5,
    "umt5": _T5,
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "mamba": {"state_size": 4, "time_step_rank": 16, "conv_kernel": 4},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "sliding_window": 64},
    "gemma3_text": {"head_dim": 256, "sliding_window": 64},
    "qwen3": {"head_dim": 128},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1408},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 64, "intermediate_size": 256},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "intermediate_size": 256},
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
                                   "shared_expert_intermediate_size": 256},
    "deepseek_v2": _LATENT | {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": _LATENT | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "glm4_moe": _ROUTED | {"head_dim": 64, "use_qk_norm": True, "norm_topk_prob": True},
    "dots1": _ROUTED | {"head_dim": 64, "sliding_window": None},
    "gemma4_text": {
        "num_hidden_layers": 6, "head_dim": 64, "global_head_dim": 128, "hidden_size_per_layer_input": 32, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True, "vocab_size_per_layer_input": 96, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "exaone4": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 256, "moe_num_shared_experts": 1, "head_dim": 64},
    "lfm2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention"]},
    "gpt_bigcode": {"n_embd": 256, "n_layer": 2, "n_head": 4, "max_position_embeddings": 64},
    "hunyuan_v1_dense": {"head_dim": 64},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {"head_dim": 64},
    "ministral3": {"head_dim": 64},
    "cohere2": {"sliding_window": 64},
    "glm4": {"head_dim": 64},
    "glm": {"head_dim": 64},
}  # fmt: skip


def tiny_config(kind: str, **options: Any) -> Any:
    """A small configuration of a type of model."""
    return AutoConfig.for_model(kind, **{**BASE, **OTHERS.get(kind, {}), **options})


def tiny_model(kind: str, **options: Any) -> Any:
    """A small random model. Norms, biases and the like are random, too, so that mixing them up shows."""
    torch.manual_seed(7)
    config = tiny_config(kind, **options)
    config.tie_word_embeddings = config.tie_word_embeddings and options.get(
        "tie_word_embeddings", True
    )  # T5 forgets it
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    if config.is_encoder_decoder:
        model.set_input_embeddings(model.get_input_embeddings())  # both halves have the same table, tied head or not
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if parameter.dim() == 1 or "bias" in name.rpartition(".")[2]:
                if not name.endswith("A_log"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def rows_of(values: Tensor, format: str) -> tuple[int, bytes]:
    """The type and bytes of a tensor, `[..., K]`."""
    if format in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format]
        return TYPES[format], values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    packed = torch.stack([isqtorch.quantize(each, format).data for each in values.reshape(-1, *values.shape[-2:])])
    return TYPES[format], packed.numpy().tobytes()


def dims_of(value: Tensor) -> tuple[int, ...]:
    """The dims of a tensor in a file: reversed, without 1 at the end."""
    dims = list(value.shape[::-1])
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


def fitting(format: str, columns: int) -> str:
    """The format, or as llama.cpp does one that has blocks of this many columns."""
    if format in ("f32", "f16", "bf16") or columns % get_format(format).block == 0:
        return format
    return "q8_0" if columns % 32 == 0 else "f32"


def write_model(
    path: Path,
    model: Any,
    format_of: Callable[[str], str] = lambda name: "q8_0",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    fused_experts: bool = False,
    without: tuple[str, ...] = (),
    renamed: tuple[str, str] = ("", ""),
    only: str = "",
) -> Path:
    """Write a model as the converter does.

    Args:
        path: the file.
        model: a float model.
        format_of: name of a tensor in the file -> the format of a matrix.
        metadata: further or other keys.
        tensors: further tensors.
        fused_experts: gate and up in one tensor, as newer files have them.
        without: tensors to leave out.
        renamed: the start of keys, and another one.
        only: regular expression for the start of tensors to write.
    """
    config = model.config.get_text_config()
    record = of_config(config)
    keys = {f"{record.name}.{key}": value for key, value in record.keys(config).items()}
    out: dict[str, Any] = {}
    ties = set(model.all_tied_weights_keys)
    for name, value in model.state_dict().items():
        if name in ties:
            continue
        places = record.places(name, config)
        assert places, name
        place = places[-1] if fused_experts and len(places) > 1 else places[0]
        path_, _, leaf = name.rpartition(".")
        module = model.get_submodule(path_)
        value = value.detach().float()
        packable = layer_kind(module) is not None and leaf in matrices(module)
        if packable:
            value = upright(module, value)
        for change in place.changes:
            value = change.to_file(value)
        axis = place.row_axis(value.dim())
        if place.rows is not None:
            value = value.index_select(axis, back(place.rows(value.shape[axis])))
        if place.columns is not None:
            value = value.index_select(-1, back(place.columns(value.shape[-1])))
        for tensor, part in zip(place.tensors, value.chunk(len(place.tensors), dim=axis), strict=True):
            if place.part is not None:
                out.setdefault(tensor, []).append(part)
            elif packable:
                chosen = "f32" if "ffn_gate_inp" in tensor else format_of(tensor)  # routers are never quantized
                out[tensor] = dims_of(part), *rows_of(part, fitting(chosen, part.shape[-1]))
            else:
                out[tensor] = dims_of(part), *rows_of(part, "f32")
    out = {name: f32(torch.stack(each).numpy()) if isinstance(each, list) else each for name, each in out.items()}
    if record.head is not None:
        out |= {name: f32(each) for name, each in tensors_of(config, record.head).items()}
    named = {
        "general.architecture": record.name,
        "general.name": f"tiny {model.config.model_type}",
        **keys,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(config.vocab_size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        **(metadata or {}),
    }
    old, new = renamed
    named = {new + key.removeprefix(old) if old and key.startswith(old) else key: value for key, value in named.items()}
    out = {name: each for name, each in (out | (tensors or {})).items() if name not in without and re.match(only, name)}
    return write(path, named, out)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a model; an encoder-decoder gets the ids on both sides."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            return model(input_ids=ids, decoder_input_ids=ids).logits  # type: ignore[no-any-return]
        return model(ids).logits  # type: ignore[no-any-return]


def stock(path: Path) -> Any:
    """The model as transformers reads it, with all weights decoded."""
    name = path.name
    auto = AutoModelForSeq2SeqLM if "t5" in name else AutoModelForCausalLM
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return auto.from_pretrained(path.parent, gguf_file=name, dtype=torch.float32).eval()
    finally:
        transformers.logging.set_verbosity(verbosity)


__all__ = ["get_format", "logits", "stock", "tiny_config", "tiny_model", "write_model"]
