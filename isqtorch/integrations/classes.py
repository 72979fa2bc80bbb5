"""The class of transformers that a configuration names, and what models of this class can do.

The Auto class whose mapping has the named class loads the model. The named class itself would not always do: models of
some types are loaded by a class of another family, and only the Auto classes know which. Parts of models (the text model
of a CLIP, the depth decoder of a Moshi) can be saved on their own, and many of them are in no mapping: then the class
that has the name and the configuration loads them. This file reads `_model_mapping`,
a private name of transformers; without it every load fails, so every test notices.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Literal, cast

Need = Literal["reads", "answers", "continues"]
"""What a model has to do with a text: read it in one pass, answer it with text, or say how likely each token is."""

# The first ones decide where a configuration names no class. What generates text comes first, the bare model last.
_FIRST = (
    "CausalLM",
    "ImageTextToText",
    "MultimodalLM",
    "Seq2SeqLM",
    "SpeechSeq2Seq",
    "MaskedLM",
    "TextEncoding",
    "SequenceClassification",
)
_PREFIX = "AutoModelFor"
_LAST = f"{_PREFIX}PreTraining"  # gives some classes that other Auto classes give too


def architectures(config: Any) -> list[str]:
    """The classes that config.json names; empty if it names none."""
    names = getattr(config, "architectures", None)
    return [name for name in names if isinstance(name, str)] if isinstance(names, (list, tuple)) else []


def described(source: str, config: Any) -> str:
    """Say what a model is: "./bert is a BertForSequenceClassification"."""
    return f"{source} is a {next(iter(architectures(config)), f'model of type {config.model_type}')}"


def auto_class(source: str, config: Any, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The Auto class that loads a model as the class that its configuration names, and this class.

    Args:
        source: the model, for messages.
        config: its configuration.
        trust_remote_code: whether the configuration may name code in the repository of the model.

    Returns:
        The Auto class, or a `Direct` in its place; and the class, or None if the repository has it.

    Raises:
        ValueError: transformers has no class for this type, or not the one that is named.
    """
    named = {name.casefold() for name in architectures(config)}  # old files spell LLaMAForCausalLM
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and type(config).__module__.startswith("transformers_modules"):
        found = next((auto for auto in _auto_classes() if auto.__name__ in remote), None)
        if found is not None:
            return found, None
    known = [(auto, _classes(auto, config)) for auto in _auto_classes()]
    having = [(auto, classes) for auto, classes in known if classes]
    for auto, classes in having:
        for cls in classes:
            if cls.__name__.casefold() in named or not named:
                return auto, cls
    direct = _direct(config, named)
    if direct is not None:
        return direct, direct.cls
    # A type may be loaded by another family's class: then at least the task agrees.
    for auto, classes in having:
        if any(name.endswith(f"for{auto.__name__.removeprefix(_PREFIX)}".casefold()) for name in named):
            return auto, classes[0]
    import transformers

    if not having:
        why = f"transformers {transformers.__version__} has no class for the type {config.model_type!r}"
    else:
        names = ", ".join(dict.fromkeys(cls.__name__ for _, classes in having for cls in classes))
        why = f"the classes of transformers {transformers.__version__} for the type {config.model_type!r} are {names}"
    way = (
        "Its repository has code for it, which runs with trust_remote_code=True in Python."
        if remote
        else "Upgrade transformers."
    )
    raise ValueError(f"{described(source, config)}, and {why}. {way}")


@dataclass(frozen=True)
class Direct:
    """A class that no Auto class has, with the methods of an Auto class."""

    cls: Any

    def from_pretrained(self, *args: Any, **options: Any) -> Any:
        return self.cls.from_pretrained(*args, **options)

    def from_config(self, config: Any, *, trust_remote_code: bool = False, **settings: Any) -> Any:
        return self.cls._from_config(config, **settings)


def _direct(config: Any, named: set[str]) -> Direct | None:
    """The class that a configuration names, if the file of its model type has it and no Auto class knows it."""
    import transformers

    package, _, file = type(config).__module__.rpartition(".")
    if not named or not package.startswith("transformers.models."):
        return None
    try:
        found = vars(importlib.import_module(f"{package}.{file.replace('configuration_', 'modeling_', 1)}"))
    except ImportError:  # some types have only a configuration; or a package that its code needs is missing
        return None
    for name, cls in found.items():
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if is_model and name.casefold() in named and cast(Any, cls).config_class is type(config):
            return Direct(cls)
    return None


def _classes(auto: Any, config: Any) -> list[Any]:
    try:  # `in` is not enough: it is False for some types that share the class of their configuration
        found = auto._model_mapping[type(config)]
    except (KeyError, ValueError):  # ValueError: some mappings name a class that transformers does not have
        return []
    return list(found) if isinstance(found, (tuple, list)) else [found]


@functools.cache
def _auto_classes() -> tuple[Any, ...]:
    """All Auto classes of models, in the order in which they are asked."""
    import transformers
    from transformers.models.auto import modeling_auto

    others = sorted(name for name in vars(modeling_auto) if name.startswith(_PREFIX) and name != _LAST)
    names = dict.fromkeys([*(_PREFIX + task for task in _FIRST), *others, _LAST])
    return (*(getattr(modeling_auto, name) for name in names), transformers.AutoModel)


def unable(cls: Any, config: Any, need: Need) -> str | None:
    """Why a model does not do what is needed; None if it does.

    Args:
        cls: its class; None: code of its repository, about which nothing is known.
        config: its configuration.
        need: what is needed.
    """
    if cls is None:
        return None
    if cls.main_input_name != "input_ids":
        return f"whose input is {cls.main_input_name} and not text"
    if need != "reads":
        makes = getattr(cls, "output_modalities", None) or ("text",)
        if not cls.can_generate() or "text" not in makes:
            return "which does not generate text"
    if need != "answers" and getattr(config, "is_encoder_decoder", False):
        return "which has an encoder beside its decoder and continues no text"
    return None
