"""Tiny mixture-of-experts models of transformers, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_ROUTED = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
_GROUPED = {"moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
_LATENT = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}


def _model(prefix: str, config: dict[str, Any], base: dict[str, Any] | None = None) -> Any:
    import transformers

    text = "Text" if prefix == "Llama4" else ""
    built = getattr(transformers, f"{prefix}{text}Config")(**{**(BASE if base is None else base), **config})
    return getattr(transformers, f"{prefix}ForCausalLM")(built)


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = {**BASE, **_ROUTED, "intermediate_size": 128, "head_dim": 32, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def _step3p7() -> Any:
    """The text model: the rest is a vision tower."""
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    routed = {"moe_intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "share_expert_dim": 64}
    layers = {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2, "swiglu_limits": [0, 0.5]}
    return Step3p7TextModel(
        Step3p7TextConfig(**BASE, **routed, **layers, intermediate_size=128, head_dim=32, sliding_window=16)
    )


def _step3p7_whole() -> Any:
    """Its checkpoints have the gates and the rest of the experts as two stacks."""
    from transformers.models.step3p7.configuration_step3p7 import Step3p7Config
    from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 56, "patch_size": 14}
    return Step3p7ForConditionalGeneration(Step3p7Config(text_config=_step3p7().config.to_dict(), vision_config=vision))


def _inkling() -> Any:
    from transformers.models.inkling.configuration_inkling import InklingTextConfig
    from transformers.models.inkling.modeling_inkling import InklingForCausalLM

    routed = {"moe_intermediate_size": 64, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2}
    heads = {"head_dim": 32, "swa_head_dim": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}
    layers = {"mlp_layer_types": ["sparse"] * 2, "layer_types": ["hybrid_sliding", "hybrid"]}
    return InklingForCausalLM(InklingTextConfig(**BASE, **routed, **heads, **layers, intermediate_size=128))


FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: _model("Mixtral", {"intermediate_size": 128, "num_local_experts": 4, "head_dim": 32}),
    "phimoe": lambda: _model("Phimoe", {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": lambda: _model(
        "Qwen2Moe", {**_ROUTED, "intermediate_size": 128, "shared_expert_intermediate_size": 64}
    ),
    "qwen3_moe": lambda: _model("Qwen3Moe", {**_ROUTED, "intermediate_size": 128, "head_dim": 32}),
    "qwen3_vl_moe": _qwen3_vl,
    "qwen3_next": lambda: _model(
        "Qwen3Next",
        {
            **_ROUTED,
            "intermediate_size": 128,
            "shared_expert_intermediate_size": 64,
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v2": lambda: _model(
        "DeepseekV2", {**_GROUPED, **_LATENT, "intermediate_size": 128, "q_lora_rank": 32, "first_k_dense_replace": 1}
    ),
    "deepseek_v3": lambda: _model(
        "DeepseekV3", {**_GROUPED, **_LATENT, "intermediate_size": 128, "q_lora_rank": 32, "first_k_dense_replace": 1}
    ),
    "glm4_moe": lambda: _model(
        "Glm4Moe", {**_GROUPED, "intermediate_size": 128, "head_dim": 32, "first_k_dense_replace": 1}
    ),
    "glm4_moe_lite": lambda: _model(
        "Glm4MoeLite",
        {**_GROUPED, **_LATENT, "intermediate_size": 128, "q_lora_rank": 32, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "gpt_oss": lambda: _model(
        "GptOss",
        {
            "intermediate_size": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
        },
    ),
    "granitemoe": lambda: _model(
        "GraniteMoe", {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "olmoe": lambda: _model("Olmoe", {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}),
    "nemotron_h": lambda: _model(
        "NemotronH",
        {
            "layers_block_type": ["attention", "moe"],
            "head_dim": 32,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "llama4": lambda: _model(
        "Llama4",
        {
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 32,
            "interleave_moe_layer_step": 1,
        },
    ),
    "jetmoe": lambda: _model(
        "JetMoe",
        {"kv_channels": 32, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        {name: BASE[name] for name in BASE if name not in ("num_attention_heads", "max_position_embeddings")},
    ),
    "longcat_flash": lambda: _model(
        "LongcatFlash",
        {
            **_LATENT,
            "num_layers": 1,
            "ffn_hidden_size": 128,
            "q_lora_rank": 32,
            "head_dim": 32,
            "moe_topk": 4,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 64,
        },
    ),
    "step3p7": _step3p7,
    "step3p7_whole": _step3p7_whole,
    "inkling": _inkling,
}


def build(name: str) -> Any:
    """A model in bf16, its weights large enough for the layers to matter."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to(torch.bfloat16).eval()
