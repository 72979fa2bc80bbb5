"""Folders of export_mlx in mlx-lm, and folders of mlx-lm in isqtorch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from mlx_lm_engine import ask_mlx
from models import tiny_llama
from tiny_decoders import CONFIGS, tiny
from torch import Tensor

import isqtorch
from isqtorch.formats import formats, get_format
from isqtorch.integrations.checkpoints.mlx.layouts import LAYOUTS
from isqtorch.modules.parameter import plain_bytes

DEMO = Path(__file__).resolve().parent.parent.parent / "examples" / "demo_model" / "model"
IDS = [int(i) for i in torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(1))]
FLOAT = 1e-3  # some activation functions are approximations there
PACKED = 0.03  # MLX rounds decoded weights to the type of the scales
# What mlx-lm computes otherwise.
REFUSED = (
    "glm",
    "llama with yarn positions, a factor for attention",
    "gemma3_text with linear positions",
    "phi3 with longrope positions",
    "gpt_neox, sequential",
    "deepseek_v2",
    "deepseek_v2, lite",
    "lfm2",
    "qwen3_5_text",
    "qwen3_5_moe_text",
)
CASES = [case for case in CONFIGS if case.replace(",", " ").split()[0] in LAYOUTS and case not in REFUSED]
# gemma2: mlx-lm attends to the whole text, however long it is. The others are as the real models are.
OTHERWISE = {
    "gemma2": {"sliding_window": 64},
    "gpt2": {"tie_word_embeddings": True},
    "gpt_neox": {"intermediate_size": 256},
    # With 64 layers, as llama.cpp wants it, rounding errors add up.
    "exaone4, windows": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "granite": {"intermediate_size": 128},  # mlx-lm quantizes it in groups of 64
    "granite, biases": {"intermediate_size": 128},
    "lfm2_moe": {"tie_word_embeddings": True},
    "granitemoe": {"intermediate_size": 128},
    "gpt_oss": {"intermediate_size": 128},
}


@pytest.fixture(autouse=True)
def as_mlx_lm_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for case, settings in OTHERWISE.items():
        monkeypatch.setitem(CONFIGS, case, CONFIGS[case] | settings)


@torch.no_grad()
def logits(model: Any, ids: list[int] | None = None) -> Tensor:
    return model(torch.tensor([ids or IDS])).logits[0].float()


def typical_error(got: Tensor, want: Tensor) -> float:
    """The median over the positions: a rounding error may choose another expert at some of them."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


def exported(model: Any, folder: Path) -> Path:
    isqtorch.export_mlx(model, folder, tokenizer=False)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_float(case: str, tmp_path: Path) -> None:
    """Names, configuration and the order of rows: any error in them changes the logits of random weights."""
    model = tiny(case)
    found = ask_mlx(exported(model, tmp_path / "mlx"), ids=[IDS])
    assert relative_error(found["logits0"], logits(model)) < FLOAT


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_lm_computes_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises((NotImplementedError, ValueError), match="export_mlx: .*mlx-lm"):
        exported(tiny(case), tmp_path / "mlx")


@pytest.mark.parametrize("case", CASES)
def test_packed(case: str, tmp_path: Path) -> None:
    model = tiny(case)
    isqtorch.quantize_(model, "afq8g32", progress=False)
    found = ask_mlx(exported(model, tmp_path / "mlx"), ids=[IDS])
    isqtorch.dequantize_(model)
    assert typical_error(found["logits0"], logits(model)) < PACKED


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_mlx_lm_has_written(case: str, tmp_path: Path) -> None:
    model = tiny(case)
    exported(model, tmp_path / "source")
    wanted = {"group_size": 32, "bits": 8, "to": str(tmp_path / "theirs")}
    found = ask_mlx(tmp_path / "source", ids=[IDS], convert=wanted)
    shutil.copy(tmp_path / "source" / "generation_config.json", tmp_path / "theirs")
    opened = isqtorch.load(tmp_path / "theirs", dtype="float32")
    assert not [note for note in opened.report.notes if "no place" in note]
    isqtorch.dequantize_(opened.model)
    assert typical_error(logits(opened.model), found["logits0"]) < PACKED


@pytest.mark.parametrize(
    "fmt", [name for name in formats(variants=True) if get_format(name).solver == "affine"] + ["mxfp4"]
)
def test_weights_decode_to_the_same_values(fmt: str, tmp_path: Path) -> None:
    """MLX rounds the product of code and scale, and the sum with the bias, to the type of the scales."""
    model = tiny_llama(dtype=torch.float32)
    topology = {"/embed_tokens|lm_head/": "afq6"} if fmt == "mxfp4" else None
    isqtorch.quantize_(model, fmt, topology=topology, fallback="error", progress=False)
    folder = exported(model, tmp_path / "mlx")
    path = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(path)
    used = get_format(fmt)
    assert layer.format == fmt
    mode = "mxfp4" if fmt == "mxfp4" else "affine"
    setting = {"group_size": used.block, "bits": used.bits, "mode": mode}
    theirs = ask_mlx(folder, decode=[path], settings={path: setting})[path]
    if mode == "mxfp4":
        assert torch.equal(theirs, layer.dequantize())
        return
    fields = used.unpack(plain_bytes(layer.weight).reshape(-1, used.block_bytes))
    kind = fields["scale"].dtype
    product = (fields["q"].float() * fields["scale"].float()[:, None]).to(kind)
    rounded = (product.float() + fields["bias"].float()[:, None]).to(kind)
    assert torch.equal(theirs, rounded.float().view(theirs.shape))
    assert relative_error(theirs, layer.dequantize()) < (0.001 if kind == torch.float16 else 0.008)


def test_the_demo_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float16).eval()
    isqtorch.quantize_(model, "afq4", progress=False)
    isqtorch.export_mlx(model, tmp_path / "mlx")
    text = (DEMO.parent / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:1200])["input_ids"][:32]
    prompts, steps = ["The ", text[:20]], 16
    found = ask_mlx(tmp_path / "mlx", ids=[ids], prompts=prompts, steps=steps)
    isqtorch.dequantize_(model, torch.float32)
    model.float()
    assert relative_error(found["logits0"], logits(model, ids)) < 0.01
    for number, prompt in enumerate(prompts):
        known = tokenizer(prompt)["input_ids"]
        start = len(known)
        for _ in range(steps):
            known.append(int(logits(model, known)[-1].argmax()))
        assert found[f"new{number}"].tolist() == known[start:]
