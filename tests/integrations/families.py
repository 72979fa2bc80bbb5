"""Tiny models of many classes in folders, as their owners write them: with tokenizer, processor and other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

DEMO = Path(__file__).resolve().parents[2] / "examples/demo_model/model"


def qwen3_vl_moe() -> Any:
    text = {
        "vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "moe_intermediate_size": 64, "num_experts": 4,
        "num_experts_per_tok": 2, "intermediate_size": 128,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def gemma3() -> Any:
    text = {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.image_token_index = 4095
    return transformers.Gemma3ForConditionalGeneration(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=20, pad_token_id=0,
        max_target_positions=20, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=4096, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "gemma3": gemma3,
    "whisper": whisper,
    "t5": t5,
    "bert": bert,
    "vit": vit,
}
OF_TEXT = ("gemma3", "t5", "bert", "whisper")  # these get the demo model's tokenizer


def written(name: str, folder: Path) -> Path:
    """A folder with a model, and with the files that its owner puts beside it."""
    torch.manual_seed(0)
    MODELS[name]().eval().save_pretrained(folder)
    if name in OF_TEXT:
        for file in DEMO.glob("token*"):
            shutil.copy(file, folder)
    if name == "whisper":
        transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    if name == "vit":
        content = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def embedder(folder: Path) -> Path:
    """A model of sentence-transformers."""
    written("bert", folder)
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 64},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
