"""Families of transformers models, tiny and random: what a linear layer or a table can be, and what is left alone."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import state_bytes
from torch import nn

from isqtorch import checkpoint
from isqtorch.inplace.dequantize import dequantize_
from isqtorch.inplace.quantize import quantize_
from isqtorch.inplace.requantize import requantize_
from isqtorch.modules import PackedModule, QuantEmbedding, QuantLinear
from isqtorch.modules.convert import layer_kind
from isqtorch.modules.subclasses import meaning_of

transformers = pytest.importorskip("transformers", "5.0")

IDS = torch.arange(16).view(2, 8) + 5
TEXT = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
SEQ2SEQ = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SEQ2SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_start_token_id": 2}
VISION = {**ENCODER, "image_size": 32, "patch_size": 8}

# name -> (class of the model, its options, inputs, regex of the names that stay as they are)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32}, ("ids",), "wpe"),
    "llama": ("LlamaForCausalLM", {**ENCODER, "num_key_value_heads": 1}, ("ids",), ""),
    "llama-tied": (
        "LlamaForCausalLM",
        {**ENCODER, "num_key_value_heads": 1, "tie_word_embeddings": True},
        ("ids",),
        "",
    ),
    "falcon": ("FalconForCausalLM", ENCODER, ("ids",), ""),
    "gemma3": ("Gemma3ForCausalLM", {**ENCODER, "num_key_value_heads": 1, "head_dim": 32}, ("ids",), ""),
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 1, "n_head": 2}, ("ids",), ""),
    "bart": (
        "BartForConditionalGeneration",
        {**SEQ2SEQ, "scale_embedding": True, "max_position_embeddings": 32},
        ("ids",),
        "embed_positions",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2},
        ("ids", "decoder"),
        r"relative_attention_bias|DenseReluDense\.wo",
    ),
    "bert": (
        "BertForMaskedLM",
        {**ENCODER, "max_position_embeddings": 32},
        ("ids",),
        "position_embeddings|token_type_embeddings",
    ),
    "deberta": (
        "DebertaV2ForMaskedLM",
        {**ENCODER, "max_position_embeddings": 32, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ("ids",),
        "position_embeddings|rel_embeddings",
    ),
    "vit": (
        "ViTForImageClassification",
        {**VISION, "num_labels": 10},
        ("image",),
        r"cls_token|position_embeddings|projection",
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**TEXT, **ENCODER, "max_position_embeddings": 32, "projection_dim": 32},
            "vision_config": {**VISION, "projection_dim": 32},
            "projection_dim": 32,
        },
        ("ids", "image"),
        "position_embedding|patch_embedding",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
        ("audio", "decoder"),
        "conv[12]|embed_positions",
    ),
    "mamba": (
        "MambaForCausalLM",
        {"hidden_size": 64, "state_size": 16, "num_hidden_layers": 1},
        ("ids",),
        r"A_log|conv1d|x_proj|dt_proj|out_proj",
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """The model with random weights, and a function that calls a model of this family."""
    name, options, inputs, _ = FAMILIES[family]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    if "text_config" not in options and "ViT" not in name:
        options = {**TEXT, **options}
    model = cls(cls.config_class(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "ids": {"input_ids": IDS},
        "decoder": {"decoder_input_ids": IDS},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)},
        "audio": {"input_features": torch.randn(2, 16, 40, generator=generator)},
    }
    call = {key: value for kind in inputs for key, value in arguments[kind].items()}

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            out = model(**call)
        return out.logits if hasattr(out, "logits") else out.image_embeds

    return model, run


@every_family
def test_quantize_save_load_dequantize(family: str, tmp_path: Path) -> None:
    model, run = build(family)
    classes = {name: type(module) for name, module in model.named_modules()}
    matrices = {name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1}
    float_out = run(model)

    report = quantize_(model, "q8_0")
    out = run(model)
    assert 0 < (out - float_out).norm() / float_out.norm() < 0.05
    described = {entry.name for entry in (*report.layers, *report.left)}
    assert {name.removesuffix(".weight") for name in matrices} <= described | {f"{name}.weight" for name in described}
    assert all(entry.reason for entry in report.left)
    kept = FAMILIES[family][3]
    for entry in report.left:
        assert kept and re.search(kept, entry.name), entry
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedModule)}
    assert packed and not any(kept and re.search(kept, name) for name in packed)

    checkpoint.save(model, tmp_path / "model.safetensors")
    again, _ = build(family)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    checkpoint.load_(again, tmp_path / "model.safetensors")
    assert torch.equal(run(again), out) and state_bytes(again) == state_bytes(model)

    dequantize_(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert (run(model) - out).norm() / out.norm() < 0.03  # kernels round activations to int8


# ---- scaled tables -------------------------------------------------------------------------------------------------------


def subclasses() -> dict[str, str]:
    """Qualified name -> base of every direct subclass of nn.Linear and nn.Embedding in transformers' models."""
    found = {}
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        for name, base in re.findall(r"^class (\w+)\(nn\.(Linear|Embedding)\):", source, re.M):
            found[f"transformers.models.{path.parent.name}.{path.stem}.{name}"] = base
    return found


def scaled(name: str, scale: float = 8.1) -> nn.Embedding:
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)(48, 64, 0, embed_scale=scale)


def check_scaled(name: str) -> None:
    table = scaled(name).bfloat16()
    model = nn.Sequential(table)
    want = table(IDS)
    quantize_(model, "q8_0")
    packed = model[0]
    assert isinstance(packed, QuantEmbedding) and packed.scale == pytest.approx(8.1)
    plain = nn.functional.embedding(IDS, packed.dequantize())
    assert torch.equal(packed(IDS), plain * (8.125 if packed.scale_is_rounded else 8.1))  # bf16 has no 8.1
    assert packed(IDS).dtype == want.dtype and (packed(IDS) - want).norm() / want.norm() < 0.02
    assert packed.embed_scale == torch.tensor(8.1, dtype=torch.bfloat16)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), packed(IDS))
    requantize_(model, "q5_0", source="stored")
    assert "embed_scale=8.1" in repr(model)
    quantized = model[0](IDS)
    dequantize_(model)
    assert type(model[0]) is type(table) and torch.equal(model[0](IDS), quantized)
    assert repr(model[0]) == repr(table) and set(vars(model[0])) == set(vars(table))


SCALED = [f"transformers.models.{n}" for n in ("bart.modeling_bart.BartScaledWordEmbedding",)]
SCALED += ["transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding"]


@pytest.mark.parametrize("name", SCALED, ids=lambda name: name.rpartition(".")[2])
def test_scaled_tables(name: str) -> None:
    check_scaled(name)


@pytest.mark.slow  # imports most of transformers' text models
def test_every_subclass_is_understood_or_known_to_be_left() -> None:
    left = set()
    for name, base in subclasses().items():
        module, _, cls = name.rpartition(".")
        meaning = meaning_of(getattr(importlib.import_module(module), cls))
        if meaning is None:
            left.add(cls)
        elif meaning.scale:
            check_scaled(name)
        else:
            assert meaning.kind == base.lower()
    assert not [
        cls for cls in left if re.search("ScaledWordEmbedding$", cls) and cls != "T5Gemma2TextScaledWordEmbedding"
    ]
    known = "Router$|Position|Decoupled|GroupedLinear$|NormedEmbedding$|VisualEmbeddingTable$|^T5Gemma2TextScaled"
    assert not [cls for cls in left if not re.search(known, cls)]


def test_esmfold_linear_comes_back_with_its_options() -> None:
    esmfold = pytest.importorskip("transformers.models.esm.modeling_esmfold")
    layer = esmfold.EsmFoldLinear(64, 32, init="relu")
    model = nn.Sequential(layer)
    quantize_(model, "q8_0")
    assert isinstance(model[0], QuantLinear)
    dequantize_(model)
    assert type(model[0]) is esmfold.EsmFoldLinear and model[0].init == "relu" and model[0].bias is layer.bias


class ScaledOtherwise(nn.Embedding):
    """Looks like a scaled table and is none that is understood."""

    embed_scale = 2.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale + 1


class ReadsItself(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden_states = input @ self.weight.T
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias

    def norm(self) -> torch.Tensor:
        return self.weight.norm()


def test_what_is_not_understood_is_left() -> None:
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    assert layer_kind(falcon.FalconLinear(2, 2)) == "linear"
    layer = falcon.FalconLinear(2, 2)
    layer.extra = nn.Linear(2, 2)  # no longer what its class says
    odd = falcon.FalconLinear(2, 2)
    odd.register_buffer("scale", torch.ones(1))
    for module in (layer, odd, ScaledOtherwise(4, 4), ReadsItself(2, 2), type("Sub", (falcon.FalconLinear,), {})(2, 2)):
        assert layer_kind(module) is None
    assert not hasattr(QuantEmbedding(4, 32, format="q8_0"), "embed_scale")
    report = quantize_(nn.Sequential(ScaledOtherwise(32, 32), nn.Linear(32, 32)), "q8_0")
    assert "ScaledOtherwise is a subclass of nn.Embedding with code of its own" in report["0"].reason


@pytest.mark.parametrize("family", ["gpt2", "falcon", "gemma3", "bart", "llama-tied"])
def test_loading_quantized_gives_what_quantizing_gives(family: str, tmp_path: Path) -> None:
    import isqtorch

    pytest.importorskip("transformers", "5.23")
    model, run = build(family)
    model.save_pretrained(tmp_path / "float")
    cls = type(model)
    quantize_(model, "q8_0")
    loaded = cls.from_pretrained(tmp_path / "float", quantization_config=isqtorch.IsqConfig("q8_0"), dtype="auto")
    assert torch.equal(run(loaded), run(model)) and state_bytes(loaded) == state_bytes(model)
    loaded.save_pretrained(tmp_path / "packed")
    again = cls.from_pretrained(tmp_path / "packed")
    assert torch.equal(run(again), run(model))
    dequantize_(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in build(family)[0].modules()]
