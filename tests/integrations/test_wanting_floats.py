"""What transformers does with weights it takes for floats: counting them, resizing tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import isqtorch

transformers = pytest.importorskip("transformers")
IDS = torch.arange(3, 12)[None]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=512, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES)
    return transformers.LlamaForCausalLM(config).eval()


def gemma() -> Any:
    """Its table is scaled."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(vocab_size=512, num_key_value_heads=2, head_dim=64, **SIZES)
    return transformers.Gemma2ForCausalLM(config).eval()


def bert() -> Any:
    """Its head has a bias."""
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=512, **SIZES)).eval()


MODELS = {"tied": lambda: llama(tied=True), "untied": lambda: llama(tied=False), "scaled": gemma, "bias": bert}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_resized_tables(make: Any, tmp_path: Path) -> None:
    model = make()
    numel = model.num_parameters()
    isqtorch.quantize_(model, "q4k", progress=False)
    assert model.num_parameters() == numel  # weights, not bytes
    table = model.get_input_embeddings()
    rows, before = table.weight.data.clone(), model(IDS).logits.detach()
    model.resize_token_embeddings(520)
    assert torch.equal(table.weight.data[:512], rows) and table.weight.shape[0] == table.num_embeddings == 520
    after = model(IDS).logits.detach()
    assert after.shape[-1] == 520 and torch.equal(after[..., :512], before)
    assert (model.get_output_embeddings().weight is table.weight) == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, after)
    model.resize_token_embeddings(500)
    assert torch.equal(model(IDS).logits, before[..., :500])
    assert torch.equal(model.get_input_embeddings().weight.data, rows[:500])


def test_resizing_to_the_same_size_changes_nothing() -> None:
    model = llama(tied=True)
    isqtorch.quantize_(model, "q4k", progress=False)
    weight = model.get_input_embeddings().weight
    model.resize_token_embeddings(512)
    assert model.get_input_embeddings().weight is weight is model.lm_head.weight
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.get_input_embeddings().weight is weight


def test_float_models_are_resized_as_ever() -> None:
    model = llama(tied=True)
    model.resize_token_embeddings(520)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding and model.lm_head.weight.shape == (520, 256)
