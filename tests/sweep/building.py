"""A small model of any type, with random weights, and arguments with which it can be called."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isqtorch.integrations.classes import auto_class

from . import inputs, shrink
from .corrections import CORRECTIONS, TASKS

MOST_WEIGHTS = 130_000_000  # of a model that is small enough
_STD = 0.05


class NotBuilt(Exception):
    """No small model of a type could be made: this says nothing about isqtorch."""


class Built(NamedTuple):
    """A model of a type."""

    model: Any
    auto: Any  # what loads it: an Auto class, where one has the type; else the class itself
    arguments: dict[str, Tensor] | None  # None: no call of the model succeeded
    remark: str  # why not


def build(kind: str) -> Built:
    """The smallest model of a type that can be called; if none can, the smallest that can be made.

    Raises:
        NotBuilt: no model can be made, or none that is small enough.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    uncalled: Built | None = None
    why: list[str] = []
    for found in _models(kind, config_class):
        if isinstance(found, str):
            why.append(found)
            continue
        model, auto = found
        arguments, remark = _arguments(model)
        if arguments is not None:
            return Built(model, auto, arguments, "")
        uncalled = uncalled or Built(model, auto, None, remark)
    if uncalled is None:
        raise NotBuilt("; ".join(dict.fromkeys(why)))
    return uncalled


def _models(kind: str, config_class: Any) -> Iterator[tuple[Any, Any] | str]:
    """Models and what loads them, the smallest first; a text in the place of one that cannot be made."""
    try:
        defaults = config_class().to_dict()
    except Exception as error:  # of any kind: code of every type runs here
        yield f"there is no default configuration ({described(error)})"
        return
    for name in ("transformers_version", "architectures", "dtype"):
        defaults.pop(name, None)
    for settings in shrink.candidates(defaults, CORRECTIONS.get(kind, {})):
        try:
            config = config_class.from_dict(settings)
            auto, cls = class_of(kind, config)
            with torch.device("meta"):
                weights = sum(parameter.numel() for parameter in cls(config).parameters())
            if weights > MOST_WEIGHTS:
                yield f"the model has {weights / 1e6:.0f} million weights"
                continue
            torch.manual_seed(0)
            model = cls(config_class.from_dict(settings)).float().eval()
        except Exception as error:
            yield described(error)
            continue
        _fill(model)
        yield model, auto


def class_of(kind: str, config: Any) -> tuple[Any, Any]:
    """What loads a model of this type, and the class that it usually has: most types have several."""
    import transformers

    first = ["MaskedLM"]
    if getattr(config, "is_encoder_decoder", False):
        first = ["Seq2SeqLM", "SpeechSeq2Seq", *first]
    if config.sub_configs:  # the whole, and not its text model
        first = ["ImageTextToText", "MultimodalLM", "Seq2SeqLM", "TextToWaveform", *first]
    for name in (*TASKS.get(kind, ()), *first):
        auto = getattr(transformers, f"AutoModelFor{name}")
        if type(config) in auto._model_mapping:
            return auto, auto._model_mapping[type(config)]
    try:
        return auto_class(kind, config)
    except ValueError:  # a part of other models, which no Auto class has
        cls = _part(config)
        if cls is None:
            raise ValueError("a part or another name of other types: transformers has no class for it") from None
        return cls, cls


def _part(config: Any) -> Any:
    """The last class in the file of a type that has this configuration and a forward; None if there is none.

    Classes with heads come last.
    """
    from transformers import PreTrainedModel

    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        found = vars(importlib.import_module(name)).values()
    except ImportError:
        return None
    models = [cls for cls in found if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
    fitting = [cls for cls in models if cls.config_class is type(config) and cls.forward is not nn.Module.forward]
    return fitting[-1] if fitting else None


def _fill(model: nn.Module) -> None:
    """Random weights that are neither zero nor so small that layers have no effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                width = math.prod(parameter.shape[1:]) if parameter.dim() != 3 else parameter.shape[-1]
                parameter.normal_(std=min(_STD, max(width, 1) ** -0.5))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # as when it was made: it gets no gradient


def _arguments(model: Any) -> tuple[dict[str, Tensor] | None, str]:
    remark = ""
    for arguments in inputs.candidates(model):
        try:
            outputs(model, arguments)
        except Exception as error:  # wrong arguments fail anywhere in the model, in any way
            remark = remark or f"not called: {described(error)}"  # the likeliest arguments come first
        else:
            return arguments, ""
    return None, remark or "not called: its forward takes none of the known inputs"


def outputs(model: Any, arguments: Mapping[str, Tensor]) -> list[Tensor]:
    """All float tensors that a call returns, the main one first. Random numbers are the same in each call."""
    torch.manual_seed(2)
    with torch.no_grad():
        found = [each for each in _tensors(model(**arguments)) if each.is_floating_point()]
    if not found:
        raise ValueError("the model returns no float tensor")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def described(error: BaseException) -> str:
    """The beginning of an error, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]
