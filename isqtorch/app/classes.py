"""Which class of transformers a model would be loaded as, and the refusal of a model of another class.

The commands load with AutoModelForCausalLM. It makes a causal language model of any checkpoint whose type has one: of
a classifier, too, whose head it drops, to make another one of random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isqtorch.text import first_names


def causal_class(config: Any) -> str | None:
    """Name of the class that AutoModelForCausalLM makes of a configuration; None if it has none for it."""
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    found = AutoModelForCausalLM._model_mapping[type(config)]
    names: list[str] = [each.__name__ for each in (found if isinstance(found, (tuple, list)) else [found])]
    own = architectures(config)
    return next((name for name in names if name in own), names[0])


def architectures(config: Any) -> list[str]:
    """The classes that config.json names; empty if it names none."""
    names = getattr(config, "architectures", None)
    return [name for name in names if isinstance(name, str)] if isinstance(names, (list, tuple)) else []


def other_class(config: Any) -> str | None:
    """Name of the causal class of a model whose config.json names other classes, else None.

    Case is ignored: old files spell LLaMAForCausalLM.
    """
    own, loaded = architectures(config), causal_class(config)
    if not own or loaded is None or loaded.casefold() in [name.casefold() for name in own]:
        return None
    return loaded


def described(source: str, config: Any) -> str:
    """Say what a model is: "./bert is a BertForSequenceClassification"."""
    return f"{source} is a {next(iter(architectures(config)), f'model of type {config.model_type}')}"


def not_causal(source: str, config: Any, missing: Sequence[str] = ()) -> ValueError:
    """Make the error for a model that is no causal language model. It names both classes and the way out.

    Args:
        source: the model.
        config: its configuration.
        missing: names of parameters that the checkpoint lacks.
    """
    loaded = causal_class(config)
    if missing:
        why = f"it has no {first_names(missing, 2)}, which {loaded} would fill with random numbers"
    else:
        why = f"it would become a {loaded}" if loaded else "there is no causal language model of its type"
    own = next(iter(architectures(config)), "AutoModel")
    return ValueError(
        f"{described(source, config)}, but this command needs a causal language model: {why}. "
        f"In Python: model = transformers.{own}.from_pretrained(...); isqtorch.quantize_(model, 4); model.save_pretrained(...)"
    )
