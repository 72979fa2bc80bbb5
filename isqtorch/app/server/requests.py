"""Checks of request bodies.

transformers' handlers ignore fields they do not support, and fail late or not at all on values of a wrong type. Here
every field is either known and checked, size included, or refused with a clear message. Prompts and messages are
limited by the context of the model, which `handlers.py` checks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from .body import Body, check_unicode, kind, parse_inner, shown
from .grammar import MAX_CHARACTERS
from .grammar import MAX_CHOICES as MAX_FORM_CHOICES
from .images import check_image, is_image

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000  # of each
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_BIASES = 1024
MAX_PROMPTS = 32
MAX_N = 16
MAX_LOGPROBS = 20  # of the likeliest tokens
MAX_NAME_CHARACTERS = 256  # of a model, a format, a role
_MAX_CHARACTERS: Mapping[str, int] = {  # of a field as JSON
    "tools": 1 << 18,
    "chat_template_kwargs": 1 << 14,
    "suffix": 1 << 16,
}
_MAX_IGNORED_CHARACTERS = 1 << 14
_MIN_TEMPERATURE = 0.001  # scores divided by less can overflow

# ignored: no effect on the answer
_HARMLESS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls"}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # not supported, but these values have no effect
    "best_of": (None, 1),
    "echo": (None, False),
    "modalities": (None, ["text"]),
}


def check_chat(body: Body) -> None:
    """Check a body of /v1/chat/completions; a ValueError names the wrong field and what it must be."""
    check_fields(
        body,
        {
            "messages",
            "tools",
            "tool_choice",
            "max_completion_tokens",
            "chat_template_kwargs",
            "logit_bias",
            "top_logprobs",
        },
    )
    _check_chances(body)
    check_messages(body.get("messages"), "messages")
    _check_tool_choice(body)
    check_tools(body.get("tools"))
    check_template_settings(body.get("chat_template_kwargs"))
    bias = body.get("logit_bias")
    if bias is not None:
        body["logit_bias"] = _checked_bias(bias)
    drop_nulls(body)


def check_completion(body: Body) -> None:
    """Check a body of /v1/completions, with errors as `check_chat`; `prompt` becomes a list."""
    check_fields(body, {"prompt", "suffix"})
    logprobs = body.get("logprobs")
    if logprobs is not None and not (type(logprobs) is int and 0 <= logprobs <= MAX_LOGPROBS):
        raise ValueError(f"logprobs must be a number from 0 to {MAX_LOGPROBS}, got {shown(logprobs)}")
    body["prompt"] = checked_texts(body.get("prompt"), "prompt")
    if body.get("suffix") is not None:
        _check_text(body["suffix"], "suffix")
    drop_nulls(body)


def checked_texts(value: Any, name: str) -> list[Any]:
    """A list of texts and lists of token ids, from one or several of them."""
    several = isinstance(value, list) and not (value and type(value[0]) is int)
    values = value if several else [value]
    if not 0 < len(values) <= MAX_PROMPTS:
        raise ValueError(f"{name} must have 1 to {MAX_PROMPTS} texts, got {len(values)}")
    for i, text in enumerate(values):
        where = f"{name}[{i}]" if several else name
        if isinstance(text, list):
            check_ids(text, where)
        elif not isinstance(text, str):
            raise ValueError(f"{where} must be a string or a list of token ids, got {kind(text)}")
    return values


def check_ids(ids: Any, where: str) -> None:
    """ValueError unless a value is a list of token ids."""
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        raise ValueError(f"{where} must be a list of token ids, which are numbers from 0")


def check_messages(messages: Any, where: str) -> None:
    """ValueError unless a value is a list of messages."""
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        got = f"{len(messages)} of them" if isinstance(messages, list) else kind(messages)
        raise ValueError(f"{where} must be a list with 1 to {MAX_MESSAGES} messages, got {got}")
    for i, message in enumerate(messages):
        _check_message(message, f"{where}[{i}]")


def check_template_settings(settings: Any) -> None:
    """ValueError unless a value can be `chat_template_kwargs`."""
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"chat_template_kwargs must be an object, got {kind(settings)}")


# ---- fields ----------------------------------------------------------------------------------------------------------


def check_fields(body: Body, own: set[str]) -> None:
    """Check the fields that chat and completions share, and that there are no unknown fields."""
    checks: Mapping[str, tuple[Callable[[Any], bool], str]] = {
        "model": (_name, f"a string of up to {MAX_NAME_CHARACTERS} characters"),
        "stream": (lambda v: isinstance(v, bool), "true or false"),
        "max_tokens": (_positive, "a positive number of tokens"),
        "max_completion_tokens": (_positive, "a positive number of tokens"),
        "temperature": (
            lambda v: _number(v) and (v == 0 or _MIN_TEMPERATURE <= v <= 10),
            f"0, or a number from {_MIN_TEMPERATURE} to 10",
        ),
        "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number above 0 and up to 1"),
        "top_k": (lambda v: type(v) is int and -1 <= v < 1 << 31, "a number of tokens, or 0 or -1 for all"),
        "min_p": (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1"),
        "frequency_penalty": (_penalty, "a number from -2 to 2"),
        "presence_penalty": (_penalty, "a number from -2 to 2"),
        "repetition_penalty": (lambda v: _number(v) and 0.01 <= v <= 10, "a number from 0.01 to 10"),
        "n": (lambda v: type(v) is int and 1 <= v <= MAX_N, f"a number of replies from 1 to {MAX_N}"),
        "stream_options": (_stream_options, 'an object; {"include_usage": true} asks for the numbers of tokens'),
        "response_format": (_response_format, _RESPONSE_FORMATS),
        "logprobs": (lambda v: True, ""),  # chat and completions differ
        "guided_json": (_guided_json, f"a JSON schema of up to {MAX_CHARACTERS} characters"),
        "guided_regex": (_guided_text, f"a string of 1 to {MAX_CHARACTERS} characters"),
        "guided_grammar": (_guided_text, f"a grammar of Lark of up to {MAX_CHARACTERS} characters"),
        "guided_choice": (_guided_choice, f"a list of up to {MAX_FORM_CHOICES} strings"),
        "seed": (lambda v: type(v) is int and abs(v) < 1 << 63, "a 64-bit integer"),
        "stop": (
            _stops,
            f"a string of 1 to {MAX_STOP_CHARACTERS} characters, or a list of up to {MAX_STOPS} of them",
        ),
    }
    for name, value in body.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ValueError(f"{name} = {shown(value)} is not supported by this server; leave it out")
        elif name in checks and (name in own or name != "max_completion_tokens"):
            good, wanted = checks[name]
            if value is not None and not good(value):
                raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
        elif name not in own and name not in _HARMLESS:
            raise ValueError(f"unknown field {name[:80]!r}")
        if name in _HARMLESS or name in _MAX_CHARACTERS:
            limit = _MAX_CHARACTERS.get(name, _MAX_IGNORED_CHARACTERS)
            if len(json.dumps(value, ensure_ascii=False)) > limit:
                raise ValueError(f"{name} is too long: this server reads up to {limit} characters of it, as JSON")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not _name(message.get("role")):
        raise ValueError(f"{where} must be an object with a 'role' and a 'content'")
    if "tool_call_id" in message and message["tool_call_id"] is not None and not _name(message["tool_call_id"]):
        raise ValueError(f"{where}.tool_call_id must be a string of up to {MAX_NAME_CHARACTERS} characters")
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None and calls != []:
        _check_calls(calls, f"{where}.tool_calls")
        return
    if isinstance(content, str):
        _check_text(content, f"{where}.content")
        return
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where}.content must be a string or a list of parts, got {kind(content)}")
    for i, part in enumerate(content):
        place = f"{where}.content[{i}]"
        if is_image(part):
            check_image(part, place)
        elif isinstance(part, dict) and part.get("type") == "text":
            _check_text(part.get("text"), f"{place}.text")
        else:
            wrong = shown(part.get("type")) if isinstance(part, dict) else kind(part)
            raise ValueError(f"{place} is {wrong}; this server takes parts of type 'text' and 'image_url'")


def _check_calls(calls: Any, where: str) -> None:
    for i, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not _name(function.get("name")) or "arguments" not in function:
            raise ValueError(f"{where} must be a list of objects with a function, its name and its arguments")
        arguments, place = function["arguments"], f"{where}[{i}].function.arguments"
        if isinstance(arguments, str):
            function["arguments"] = arguments = parse_inner(arguments, place)
            check_unicode(arguments, place)
        if not isinstance(arguments, dict):
            raise ValueError(f"{place} must be a JSON object, got {kind(arguments)}")


def check_tools(tools: Any) -> None:
    """ValueError unless a value can be `tools`."""
    if tools is None:
        return
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        got = f"{len(tools)} of them" if isinstance(tools, list) else kind(tools)
        raise ValueError(f"tools must be a list of up to {MAX_TOOLS} tools, got {got}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ValueError(f"tools[{i}] must be an object, got {kind(tool)}")


def _check_chances(body: Body) -> None:
    """Check `logprobs` and `top_logprobs` of a chat."""
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise ValueError(f"logprobs must be true or false, got {shown(wanted)}")
    if top is not None and not (type(top) is int and 0 <= top <= MAX_LOGPROBS):
        raise ValueError(f"top_logprobs must be a number from 0 to {MAX_LOGPROBS}, got {shown(top)}")
    if top and not wanted:
        raise ValueError("top_logprobs needs logprobs = true")


def _check_tool_choice(body: Body) -> None:
    """Check `tool_choice`; "none" hides the tools from the model."""
    choice = body.pop("tool_choice", None)
    if choice == "none":
        body["tools"] = None
    elif choice not in (None, "auto"):
        raise ValueError(f'tool_choice can be "auto" or "none", got {shown(choice)}: a call cannot be forced here')


def _checked_bias(bias: Any) -> dict[str, float]:
    if not isinstance(bias, dict) or not all(
        key.isascii() and key.isdigit() and len(key) <= 10 and _number(value) and abs(value) <= 100
        for key, value in bias.items()
    ):
        raise ValueError("logit_bias must map token ids to numbers from -100 to 100")
    if len(bias) > MAX_BIASES:
        raise ValueError(f"logit_bias names {len(bias)} tokens; up to {MAX_BIASES} are allowed")
    return {key: float(value) for key, value in bias.items()}


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {kind(value)}")


def drop_nulls(body: Body) -> None:
    """Remove fields that have no effect: transformers reacts to the mere presence of some fields."""
    for name in [name for name, value in body.items() if value is None or name in _NEUTRAL or name in _HARMLESS]:
        del body[name]
    for name in ("stop", "tools", "logit_bias", "chat_template_kwargs"):
        if name in body and len(body[name]) == 0:
            del body[name]


_RESPONSE_FORMATS = (
    '{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"name": NAME, "schema": SCHEMA}}'
    f" with a schema of up to {MAX_CHARACTERS} characters"
)


def _response_format(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if value.get("type") == "json_schema":
        schema = value.get("json_schema")
        return (
            isinstance(schema, dict)
            and _guided_json(schema.get("schema", {}))
            and not isinstance(schema.get("schema"), str)
        )
    return value.get("type") in ("text", "json_object") and len(value) == 1


def _guided_json(value: Any) -> bool:
    return isinstance(value, (dict, str)) and len(json.dumps(value, ensure_ascii=False)) <= MAX_CHARACTERS


def _guided_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_CHARACTERS


def _guided_choice(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_FORM_CHOICES
        and all(isinstance(text, str) and text for text in value)
        and sum(map(len, value)) <= MAX_CHARACTERS
    )


def _stream_options(value: Any) -> bool:
    return (
        isinstance(value, dict) and value.get("include_usage") in (None, True, False) and len(json.dumps(value)) < 1000
    )


def _penalty(value: Any) -> bool:
    return _number(value) and -2 <= value <= 2


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _number(value: Any) -> bool:
    """Whether a value is a number that fits into a float."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 63)


def _name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME_CHARACTERS


def _stops(value: Any) -> bool:
    if not isinstance(value, (str, list)):
        return False
    items = [value] if isinstance(value, str) else value  # an empty list is like no list
    return len(items) <= MAX_STOPS and all(
        isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARACTERS for item in items
    )
