"""Which class loads a configuration: the one it names, for every type and class that transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

import isqtorch
from isqtorch.integrations.classes import auto_class


def pairs() -> list[tuple[type, type]]:
    """All (class of a configuration, class of a model) of transformers' Auto classes of models."""
    autos = [getattr(modeling_auto, name) for name in vars(modeling_auto) if name.startswith("AutoModelFor")]
    found = {}
    for auto in [*autos, transformers.AutoModel]:
        for config in auto._model_mapping:
            try:
                classes = auto._model_mapping[config]
            except ValueError:  # the mapping names a class that transformers does not have
                continue
            for cls in classes if isinstance(classes, (tuple, list)) else [classes]:
                found[config, cls] = None
    return list(found)


def configuration(cls: Any, *architectures: str) -> Any:
    """A configuration of a type, without the values that its class would compute."""
    config = cls.__new__(cls)
    config.__dict__.update(architectures=list(architectures))
    return config


@pytest.mark.slow
def test_every_class_is_loaded_as_itself() -> None:
    """This imports every model of transformers."""
    wrong = []
    for config, cls in pairs():
        _, found = auto_class("x", configuration(config, cls.__name__))
        if found is not cls:
            wrong.append((config.__name__, cls.__name__, found.__name__))
    assert not wrong


@pytest.mark.parametrize(
    ("config", "architectures", "expected"),
    [
        ("LlamaConfig", ["LLaMAForCausalLM"], "LlamaForCausalLM"),  # as old files spell it
        ("LlamaConfig", ["Spam", "LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        ("LlamaConfig", ["ExaoneForCausalLM"], "LlamaForCausalLM"),  # a class of another family, for the same task
        ("LlamaConfig", [], "LlamaForCausalLM"),
        ("Gemma3Config", [], "Gemma3ForConditionalGeneration"),
        ("Llama4Config", ["Llama4ForConditionalGeneration"], "Llama4ForConditionalGeneration"),
        ("MllamaConfig", ["MllamaForConditionalGeneration"], "MllamaForConditionalGeneration"),
        ("BartConfig", ["BartForConditionalGeneration"], "BartForConditionalGeneration"),
        ("BertConfig", ["BertForMaskedLM"], "BertForMaskedLM"),
        ("BertConfig", ["BertModel"], "BertModel"),
        ("WhisperConfig", ["WhisperForConditionalGeneration"], "WhisperForConditionalGeneration"),
        ("ViTConfig", [], "ViTForImageClassification"),
    ],
)
def test_a_few_of_them(config: str, architectures: list[str], expected: str) -> None:
    auto, cls = auto_class("x", configuration(getattr(transformers, config), *architectures))
    assert cls.__name__ == expected and auto.__name__.startswith("AutoModel")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("SiglipTextConfig", "SiglipTextModel"),  # no Auto class has this type
        ("CLIPTextConfig", "CLIPTextModelWithProjection"),  # AutoModel has another class for it
    ],
)
def test_a_part_that_no_auto_class_has_is_loaded_by_its_own_class(config: str, name: str, tmp_path: Path) -> None:
    cls = getattr(transformers, name)
    small = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = cls(getattr(transformers, config)(**small, num_attention_heads=4, projection_dim=256)).eval()
    model.save_pretrained(tmp_path)
    loaded = isqtorch.load(tmp_path, "q8_0", progress=False)
    assert type(loaded.model) is cls and loaded.report.quantized
    assert loaded.report.bytes_after == isqtorch.plan(tmp_path, "q8_0").bytes_after
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        got, want = loaded.model(ids)[0], model(ids)[0]
    assert 0 < float((got - want).norm() / want.norm()) < 0.05


def test_a_class_of_another_type_is_not_taken_by_its_name() -> None:
    for name in ("SiglipModel", "SiglipPreTrainedModel", "SiglipTextConfig", "nn"):  # in the same file
        with pytest.raises(ValueError, match="has no class for the type 'siglip_text_model'"):
            auto_class("x", configuration(transformers.SiglipTextConfig, name))


def test_code_of_the_repository_is_named_and_not_run() -> None:
    config = configuration(transformers.LlamaConfig, "PoemForPoetry")
    config.__dict__["auto_map"] = {"AutoModelForCausalLM": "modeling_poem.PoemForPoetry"}
    with pytest.raises(ValueError, match="x is a PoemForPoetry, .*runs with trust_remote_code=True in Python"):
        auto_class("x", config)
