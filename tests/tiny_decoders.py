"""A tiny model with random weights of every architecture that can be exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": 3,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32, "attention_bias": True, "mlp_bias": True},
    "llama with llama3 positions": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "llama with linear positions": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama with yarn positions": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama with yarn positions, a factor for attention": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.3,
        }
    },
    "llama with yarn positions, mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        }
    },
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "sliding_window": 4, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 7,
        "tie_word_embeddings": True,
    },
    "gemma3_text with linear positions": {
        "head_dim": 32,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "layer_types": ["full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 96,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "tie_word_embeddings": True,
    },
    "gemma4_text, experts": {
        "num_hidden_layers": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": True,
    },
    "phi3": {"sliding_window": None},
    "phi3 with longrope positions": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "long_factor": [1.5 + 0.1 * i for i in range(8)],
            "short_factor": [1.0 + 0.05 * i for i in range(8)],
            "original_max_position_embeddings": 2048,
        },
        "original_max_position_embeddings": 2048,
        "max_position_embeddings": 8192,
        "sliding_window": None,
    },
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "gpt2": _GPT,
    "starcoder2": {"use_bias": True},
    "falcon": {"num_kv_heads": 1, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    "falcon, grouped": {"num_kv_heads": 2, "new_decoder_architecture": True, "parallel_attn": True},
    "bloom": {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "stablelm, tied": {"tie_word_embeddings": True},
    "stablelm, parallel": {"use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    "nemotron": {"partial_rotary_factor": 0.5, "head_dim": 16},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
    },
    "granite, biases": {"attention_bias": True, "mlp_bias": True},
    "nemotron, biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "glm4, biases": {"attention_bias": True, "head_dim": 16},
    "smollm3": {"num_hidden_layers": 5},
    "arcee": {},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "head_dim": 32,
        "sliding_window": None,
    },
    "seed_oss": {"head_dim": 32},
    "ernie4_5": {"head_dim": 16},
    "olmo": {},
    "olmo2": {},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "num_hidden_layers": 5, "sliding_window": 8, "head_dim": 16},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "gpt_neox, sequential": {"use_parallel_residual": False, "num_key_value_heads": 4},
    "gpt_neox": {"rotary_pct": 0.25, "num_key_value_heads": 4},
    "mixtral": {**_LOCAL, "sliding_window": None},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_MOE, "head_dim": 32, "norm_topk_prob": True},
    "gpt_oss": {**_LOCAL, "head_dim": 32, "sliding_window": 8},
    "gpt_oss, other layers": {
        **_LOCAL,
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": {**_LOCAL, "logits_scaling": 2.0},
    "olmoe": {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {**_LOCAL, "head_dim": 32, "rotary_dim": 16},
    "deepseek_v2": {
        **_ROUTED,
        **_LATENT,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "q_lora_rank": 24,
    },
    "deepseek_v2, lite": {
        **_ROUTED,
        **_LATENT,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "q_lora_rank": None,
        "num_hidden_layers": 27,
    },
    "deepseek_v3": {**_ROUTED, **_LATENT, "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "q_lora_rank": 24},
    "glm4_moe": {**_ROUTED, "head_dim": 16, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5},
    "dots1": {
        **_ROUTED,
        "num_key_value_heads": 4,
        "sliding_window": None,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": {**_LINEAR, **_MOE, "shared_expert_intermediate_size": 48},
    "mamba": {"intermediate_size": 128, "state_size": 8, "time_step_rank": 4, "num_hidden_layers": 2},
    "falcon_mamba": {"intermediate_size": 128, "state_size": 8, "time_step_rank": 4, "num_hidden_layers": 2},
}


def kind_of(case: str) -> str:
    """The type of the model of a case."""
    return case.replace(",", " ").split()[0]


def tiny(case: str, **changes: Any) -> Any:
    """The model of a case, in float32, with norms and biases that are not those of a new model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = kind_of(case)
    settings = {**_SIZES, **CONFIGS[case], **changes}
    if kind == "gpt2":
        settings = {
            key: value for key, value in settings.items() if not key.startswith(("hidden", "num_", "max_", "inter"))
        }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.normal_(model.get_output_embeddings().weight)  # large logits, so that bounds of them show
    return model
