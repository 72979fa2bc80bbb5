"""What the tests with transformers need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch

MODELS: dict[str, Callable[[], Any]] = {
    "llama": models.tiny_llama,
    "tied": lambda: models.tiny_llama(tied=True),
    "gpt2": models.tiny_gpt2,
    "bert": models.tiny_bert,
}


def load(folder: Path, **options: Any) -> Any:
    """A model that has loaded all its weights and nothing else."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    auto = (
        AutoModelForMaskedLM if '"model_type": "bert"' in (folder / "config.json").read_text() else AutoModelForCausalLM
    )
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24)[None]).logits
