"""Tiny random models of every architecture: llama.cpp loads the file, and computes what transformers computes.

So names, configuration, and the order of rows are right: any error in them changes the logits of random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error
from llama import ask
from tiny_decoders import CONFIGS, kind_of, tiny
from torch import Tensor

import isqtorch
from isqtorch.integrations.checkpoints.gguf.architectures import ARCHITECTURES

IDS = [int(i) for i in torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(1))]
FLOAT = 1e-5
# llama.cpp has tables of f16 for GELU. It rounds the borders of gpt-oss's YaRN, and has one epsilon for all norms of Falcon Mamba.
LOOSE = {
    "gemma", "gemma2", "gemma3_text", "gemma4_text", "phi", "gpt2", "starcoder2", "falcon", "bloom", "gpt_neox", "gpt_oss",
    "falcon_mamba",
}  # fmt: skip
PACKED = 0.1  # both round activations to int8, in other places; a token may get another expert for that


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("case", CONFIGS)
def test_float(case: str, tmp_path: Path) -> None:
    model = tiny(case)
    isqtorch.export_gguf(model, tmp_path / "model.gguf", tokenizer=False)
    bound = 1e-3 if kind_of(case) in LOOSE else FLOAT
    assert relative_error(ask(tmp_path / "model.gguf", ids=[IDS]).logits, logits(model)) < bound


@pytest.mark.parametrize("case", CONFIGS)
def test_packed(case: str, tmp_path: Path) -> None:
    model = tiny(case)
    isqtorch.quantize_(model, "q8_0", progress=False)
    isqtorch.export_gguf(model, tmp_path / "model.gguf", tokenizer=False)
    got, want = ask(tmp_path / "model.gguf", ids=[IDS]).logits, logits(model)
    assert float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median()) < PACKED


def test_every_architecture_has_a_case() -> None:
    """Those with a model class of their own are encoders, and not exported."""
    cases = {kind_of(case) for case in CONFIGS}
    assert cases == {kind for record in ARCHITECTURES for kind in record.model_types if record.model is None}
