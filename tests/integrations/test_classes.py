"""Which class loads a configuration: the one it names, for every type and class that transformers has."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers.models.auto import modeling_auto

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


def test_code_of_the_repository_is_named_and_not_run() -> None:
    config = configuration(transformers.LlamaConfig, "PoemForPoetry")
    config.__dict__["auto_map"] = {"AutoModelForCausalLM": "modeling_poem.PoemForPoetry"}
    with pytest.raises(ValueError, match="x is a PoemForPoetry, .*runs with trust_remote_code=True in Python"):
        auto_class("x", config)
