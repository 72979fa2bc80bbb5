"""A small model of any type, with random weights, and arguments with which it can be called."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isqtorch.integrations.classes import auto_class

from . import inputs, shrink

MOST_WEIGHTS = 40_000_000  # of a model that is small enough
_STD = 0.05

# What a type needs otherwise than the rules of `shrink` say; "vision_config.depth" is a value of a part.
CORRECTIONS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"qk_rope_head_dim": 32},
    "mamba": {"intermediate_size": 512},
    "falcon_mamba": {"intermediate_size": 512},
    "gemma3_text": {"query_pre_attn_scalar": 64},
}


class NotBuilt(Exception):
    """No small model of a type could be made: this says nothing about isqtorch."""


class Built(NamedTuple):
    """A model of a type."""

    model: Any
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
    why = "no configuration was tried"
    for model in _models(kind, config_class):
        if isinstance(model, str):
            why = model
            continue
        arguments, remark = _arguments(model)
        if arguments is not None:
            return Built(model, arguments, "")
        uncalled = uncalled or Built(model, None, remark)
    if uncalled is None:
        raise NotBuilt(why)
    return uncalled


def _models(kind: str, config_class: Any) -> Iterator[Any]:
    """Models, the smallest first; a text in the place of one that cannot be made."""
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
            cls = class_of(kind, config)
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
        yield model


def class_of(kind: str, config: Any) -> Any:
    """The class that a model of this type usually has: most types have several."""
    from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    whole = (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq) if getattr(config, "is_encoder_decoder", False) else ()
    for auto in (*whole, AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    return auto_class(kind, config)[1]


def _fill(model: nn.Module) -> None:
    """Random weights that are neither zero nor so small that layers have no effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                width = math.prod(parameter.shape[1:]) if parameter.dim() != 3 else parameter.shape[-1]
                parameter.normal_(std=min(_STD, max(width, 1) ** -0.5))


def _arguments(model: Any) -> tuple[dict[str, Tensor] | None, str]:
    remark = "its forward takes none of the known inputs"
    for arguments in inputs.candidates(model):
        try:
            outputs(model, arguments)
        except Exception as error:  # wrong arguments fail anywhere in the model, in any way
            remark = f"not called: {described(error)}"
        else:
            return arguments, ""
    return None, remark


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
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]
