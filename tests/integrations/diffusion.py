"""Tiny models of diffusers, with inputs, and a tiny pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from made_tokenizers import word_piece
from torch import Tensor

Inputs = dict[str, Tensor]


def unet() -> tuple[Any, Inputs]:
    """As Stable Diffusion 1 and XL: convolutions, with attention between them."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 64)
    return model, {"sample": sample, "timestep": torch.tensor([3]), "encoder_hidden_states": text}


def sd3(dual: tuple[int, ...] = ()) -> tuple[Any, Inputs]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 64)}
    return model, {**inputs, "timestep": torch.tensor([3.0]), "pooled_projections": torch.randn(1, 64)}


def sd3_with_dual_attention() -> tuple[Any, Inputs]:
    """As Stable Diffusion 3.5 medium. diffusers cannot fuse its projections."""
    return sd3(dual=(0,))


def flux(channels: int = 32) -> tuple[Any, Inputs]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    inputs = {"hidden_states": torch.randn(1, 16, channels), "encoder_hidden_states": torch.randn(1, 5, 64)}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    return model, {**inputs, **ids, "timestep": torch.tensor([0.5]), "pooled_projections": torch.randn(1, 64)}


def wan() -> tuple[Any, Inputs]:
    """Video."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=32,
    )
    frames, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 5, 64)
    return model, {"hidden_states": frames, "timestep": torch.tensor([3]), "encoder_hidden_states": text}


MODELS = {"unet": unet, "sd3": sd3, "sd3 dual": sd3_with_dual_attention, "flux": flux, "wan": wan}


def made(name: str) -> tuple[Any, Inputs]:
    """A model, always with the same weights, and inputs."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), inputs


def output(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs)[0]
    return out


def pipeline() -> Any:
    """A Flux pipeline that makes an image of 16 x 16 pixels of noise."""
    torch.manual_seed(0)
    tokenizer = word_piece(True)
    tokenizer.model_max_length = 16
    clip = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    t5 = transformers.T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=transformers.CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=transformers.T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=flux(channels=16)[0],
    )


def saved_pipeline(folder: Path) -> Path:
    pipeline().save_pretrained(folder)
    return folder
