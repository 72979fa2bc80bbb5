"""What some types need otherwise than the rules of `shrink` say; "vision_config.depth" is a value of a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_THREE_AXES = [8, 12, 12]  # sections of rotary positions for heads of 64 channels
_HALF = [4, 6, 6]  # where half of the channels have positions
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SPARSE = ["dense", "sparse"]
_PICTURES = {"<image>": 400, **{f"IMGIMG{letter}Z": 401 + i for i, letter in enumerate("ABCD")}}  # tokens of pictures
_IN_SAM = {
    "vision_config.backbone_config.image_size": [256, 256],
    "vision_config.backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]],
}
_SMALL = [[16, 16], [8, 8], [4, 4]]
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
CORRECTIONS: Mapping[str, Mapping[str, Any]] = {
    # The defaults of these are None, which their code cannot use.
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "hunyuan_v1_moe": {"head_dim": 64},
    "nemotron": {"head_dim": 64, "num_key_value_heads": 4},
    # The code of these has sections for heads of 128 channels, where the configuration has none.
    "glm4v": {"text_config.rope_parameters.mrope_section": _THREE_AXES},
    "glm4v_text": {"rope_parameters.mrope_section": _THREE_AXES},
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": _HALF},
    "glm4v_moe_text": {"rope_parameters.mrope_section": _HALF},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters.mrope_section": _THREE_AXES},
    "qwen2_5_vl": {"text_config.rope_parameters.mrope_section": _THREE_AXES},
    "qwen2_5_vl_text": {"rope_parameters.mrope_section": _THREE_AXES},
    "qwen2_vl": {"text_config.rope_parameters.mrope_section": _THREE_AXES},
    "qwen2_vl_text": {"rope_parameters.mrope_section": _THREE_AXES},
    # Numbers that depend on each other.
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_head": 64},
    "bamba": {"attn_layer_indices": [1]},  # one layer of each kind
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},  # a layer for each of its cycles
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "blt": {
        "encoder_hash_byte_group_vocab": 512,
        "encoder_config.hidden_size_global": 256,
        "decoder_config.hidden_size_global": 256,
    },
    "csm": {"codec_config.upsample_groups": 256},
    "dory": {  # two entries make one layer
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots3_note": {
        "text_config.per_layer_config": {},
        "text_config.head_dim": 128,
        "vision_config.adapter_in_dim": 256,
        "vision_config.adapter_out_dim": 256,
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 128},
    "dots3_note_vision_encoder": {"adapter_in_dim": 256},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [256, 256],
        "text_config.rope_parameters.mrope_section": [12, 12, 8],
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [256, 256], "rope_parameters.mrope_section": [12, 12, 8]},
    "mistral4": {"head_dim": 128},
    # Real checkpoints have these values, and the defaults lack them.
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "chameleon": {"vocabulary_map": _PICTURES, "image_token_id": 400},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0, "attn_config.kv_n_heads": 2},
    "deepseek_ocr2": {"text_config.mlp_layer_types": _SPARSE, "text_config.num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": _SPARSE, "num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 256,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 256},
    "emu3": {"vocabulary_map": _PICTURES, "image_token_id": 400, "vq_config.base_channels": 64},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32},
    "granite4_vision": {"downsample_rate": "4/8", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    # Pictures of 1024 x 1024 take minutes.
    "sam3": {"vision_config.backbone_feature_sizes": _SMALL},
    "sam3_lite_text": {"vision_config.backbone_feature_sizes": _SMALL},
    "sam3_tracker": {"vision_config.backbone_feature_sizes": _SMALL},
    "sam3_tracker_video": {"vision_config.backbone_feature_sizes": _SMALL, "image_size": 56},
    "sam3_vision_model": {"backbone_feature_sizes": _SMALL},
    "sam2": {**_IN_SAM, "prompt_encoder_config.image_size": 256},
    "sam2_video": {**_IN_SAM, "prompt_encoder_config.image_size": 256, "image_size": 256},
    "edgetam_video": {**_IN_SAM, "prompt_encoder_config.image_size": 256, "image_size": 256},
    "sam2_vision_model": {name.removeprefix("vision_config."): value for name, value in _IN_SAM.items()},
    "sam2_hiera_det_model": {"image_size": [256, 256]},
    "step3p7": {"text_config.sliding_window": 16, "text_config.share_expert_dim": 256},
    "step3p5": {"sliding_window": 16, "share_expert_dim": 256},
    # Their default backbone needs timm.
    "conditional_detr": {"backbone_config": _RESNET},
    "dab-detr": {"backbone_config": _RESNET},
    "deformable_detr": {"backbone_config": _RESNET},
    "detr": {"backbone_config": _RESNET},
    "table-transformer": {"backbone_config": _RESNET},
    "shieldgemma2": {"yes_token_index": 300, "no_token_index": 301},
    "blip-2": {"image_token_index": 400, "num_query_tokens": 4},
    "instructblip": {"image_token_index": 400, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 400, "num_query_tokens": 4},
}

TASKS: Mapping[str, list[str]] = {"detr": ["ObjectDetection"], "shieldgemma2": ["ImageClassification"]}
"""The Auto class of a type for which others would come first that do not fit."""

FILES: Mapping[str, str] = {"qwen2_5_omni": "spk_dict.pt"}
"""A file without entries that a type reads beside its weights."""
