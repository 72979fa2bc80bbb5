"""The metadata of a file as a configuration of transformers.

No key that changes the numbers is dropped: a key that neither the record of the architecture nor `_HARMLESS` knows, and
that does not have a value without effect, is an error.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from isqtorch.files.gguf_model import GgufModel
from isqtorch.text import first_names

from .facts import MOST, Facts, as_written
from .record import Architecture
from .rope import FACTORS, LONG, SHORT, llama3_parameters, proportional_share

_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
# Keys that say nothing about the numbers, or that another key or a tensor says as well.
_HARMLESS = re.compile(
    r"vocab_size|context_length|tensor_data_layout|attention\.causal|rope\.scaling\.finetuned|quantize_imatrix\..+|"
    r"attention\.(key|value)_length|use_parallel_residual|pooling_type|rope\.dimension_count|leading_dense_block_count|"
    r"rope\.scaling\.original_context_length|rope\.scaling\.yarn_log_multiplier"
)
# Kinds of keys that change the numbers. Others that are not known are told as a note.
_TELLING = re.compile(
    r"rope\..+|attention\..+|expert.*|ssm\..+|.*(scale|scaling|softcapping|norm|clamp|alibi|multiplier|factor|interval|pattern|"
    r"activation|window|shared|residual|layers|count).*"
)
_FACTOR = re.compile("scale|scaling|multiplier|factor")
# The token that ends a turn of a chat is not always stated; llama.cpp knows these names, too.
_ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>",
     "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "<|end_of_role|>", "[EOS]"}
)  # fmt: skip
# Name in the file -> name in transformers, and the largest value.
_SAMPLING = {
    "temp": ("temperature", np.inf),
    "top_k": ("top_k", MOST),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 1.0),
}
_CONTROL, _USER_DEFINED = 3, 4


def read_config(facts: Facts, record: Architecture, model: GgufModel) -> tuple[Any, list[str]]:
    """The configuration of a file, and notes about keys that have no place in it.

    Raises:
        ValueError: a key is missing or wrong, or changes the numbers in a way that transformers' class does not know.
    """
    from transformers import AutoConfig

    values = record.values(facts)
    _read_factors(facts, values, model)
    notes = _left(facts, record)
    values["tie_word_embeddings"] = "output.weight" not in facts.shapes
    values |= token_ids(facts)
    kind = record.reads_as or record.model_types[0]
    try:
        config = AutoConfig.for_model(kind, **values)
    except Exception as error:  # each class checks its values in its own way, with errors of its own or of a library
        raise facts.error(
            f"transformers refuses its configuration as {kind!r} ({type(error).__name__}: {' '.join(str(error).split()):.300})"
        ) from None
    config.tie_word_embeddings = values[
        "tie_word_embeddings"
    ]  # T5's class sets it to True, and keeps in mind what it was
    config.architectures = [record.model or causal_class(kind)]
    if record.note:
        notes.append(record.note)
    return config, notes


def causal_class(kind: str) -> str:
    """Name of the class of causal language models for a type of config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    return found if isinstance(found, str) else found[0]


def token_ids(facts: Facts) -> dict[str, int | None]:
    """The ids of special tokens that a config has; None for those that the file does not state."""
    return {name: special_id(facts, key) for name, key in _TOKENS.items()}


def special_id(facts: Facts, key: str) -> int | None:
    """The id of a special token, such as "bos_token_id"; None if the file does not state it.

    Raises:
        ValueError: it is no row of the table of tokens.
    """
    value = facts.metadata.get(f"tokenizer.ggml.{key}")
    if value is None or (isinstance(value, int) and value in (-1, 0xFFFFFFFF)):  # "none", in some old files
        return None
    rows = facts.shape("token_embd.weight")[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < rows:
        raise facts.error(f"tokenizer.ggml.{key} is {value!r:.40}, must be the number of one of {rows} tokens")
    return value


def read_generation(facts: Facts) -> dict[str, Any]:
    """Settings for generation: the tokens that start and end texts, and sampling, as far as the file states them."""
    settings: dict[str, Any] = {name: value for name, value in token_ids(facts).items() if value is not None}
    ends = [settings.get("eos_token_id"), special_id(facts, "eot_token_id"), special_id(facts, "eom_token_id")]
    tokens, kinds = facts.metadata.get("tokenizer.ggml.tokens"), facts.metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray) and len(kinds) == len(tokens):
        special = np.flatnonzero((kinds == _CONTROL) | (kinds == _USER_DEFINED)).tolist()
        found = [number for number in special if tokens[number] in _ENDS]
        texts = {tokens[number] for number in found}
        if {"<|return|>", "<|end|>"} <= texts:  # gpt-oss: <|end|> only ends a message, and others follow
            found = [number for number in found if tokens[number] != "<|end|>"]
        ends += found
    known = [each for each in dict.fromkeys(ends) if each is not None]
    if known:
        settings["eos_token_id"] = known if len(known) > 1 else known[0]
    return settings | _sampling(facts)


def _sampling(facts: Facts) -> dict[str, Any]:
    """How to sample, as llama.cpp means it: a temperature of 0 takes the likeliest token, and a top_k of 0 takes all."""
    settings: dict[str, Any] = {}
    for key, (name, most) in _SAMPLING.items():
        value = facts.metadata.get(f"general.sampling.{key}")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not np.isfinite(value) or value > most:
            continue
        if key == "temp" and value <= 0:
            return {"do_sample": False}
        if key == "top_k":
            settings[name] = max(0, int(value))
        elif value > 0:
            settings[name] = as_written(float(value))
    return settings | {"do_sample": True} if settings else {}


def _read_factors(facts: Facts, values: dict[str, Any], model: GgufModel) -> None:
    """Turn the factors of rotary frequencies, which are tensors, back into parameters of the config."""
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, dict):
        return
    target = parameters.get("full_attention", parameters)
    if target["rope_type"] == "proportional":
        facts.shape(FACTORS)
        share = proportional_share(floats_of(model, FACTORS))
        if share is None:
            raise facts.error(f"{FACTORS} must have 1 for frequencies that turn, and then 1e30. The file is damaged.")
        target["partial_rotary_factor"] = share
    elif FACTORS in facts.shapes and target["rope_type"] == "default":
        factors = floats_of(model, FACTORS)
        if not np.all(factors == 1.0):
            found = llama3_parameters(factors, target["rope_theta"])
            if found is None:
                raise facts.error(
                    f"{FACTORS} has factors that are not those of Llama 3's rule with any of its known lengths, so that the config "
                    f"cannot state them: {np.array2string(factors, threshold=6)}"
                )
            target.update(found)
    if target["rope_type"] == "longrope":
        for name, key in ((LONG, "long_factor"), (SHORT, "short_factor")):
            facts.shape(name)
            target[key] = [as_written(float(each)) for each in floats_of(model, name)]


def floats_of(model: GgufModel, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A small tensor of type f32, flat.

    Raises:
        ValueError: it has another type.
    """
    tensor = model.tensors[name]
    if tensor.type != 0:
        raise ValueError(f"load: {model.where}: tensor {name!r} has type {tensor.type}, must be 0 (f32)")
    return model.read(tensor).reshape(-1).view(np.float32)


def _left(facts: Facts, record: Architecture) -> list[str]:
    """Look at the keys that were not read. Notes about those that change nothing that is known.

    Raises:
        ValueError: one of them changes the numbers.
    """
    start = f"{facts.architecture}."
    keys = {key.removeprefix(start): value for key, value in facts.metadata.items() if key.startswith(start)}
    left = {
        key: value
        for key, value in keys.items()
        if key not in facts.used
        and key not in record.harmless
        and not _HARMLESS.fullmatch(key)
        and not _without_effect(key, value)
    }
    telling = sorted(key for key in left if _TELLING.fullmatch(key))
    if telling:
        raise facts.error(
            f"has {first_names([f'{start}{key} = {left[key]!r:.40}' for key in telling])}, which changes what the model computes, and "
            f"which has no place in the configuration of {record.reads_as or record.model_types[0]!r}. The model would give wrong "
            "results."
        )
    return [f"the configuration has no place for {first_names([start + key for key in sorted(left)])}"] if left else []


def _without_effect(key: str, value: Any) -> bool:
    """Whether a value switches something off, or multiplies by 1."""
    neutral: tuple[Any, ...] = (0, "", "none", *((1,) if _FACTOR.search(key) else ()))
    if isinstance(value, np.ndarray):
        return all(each in neutral for each in np.unique(value).tolist())
    return value in neutral or value == []
