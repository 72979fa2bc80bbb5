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

from isqtorch.inplace.weights import STORED

from .body import Body, check_unicode, kind, parse_inner, shown

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000  # of each
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_BIASES = 1024
MAX_NAME_CHARACTERS = 256  # of a model, a format, a role
_MAX_CHARACTERS: Mapping[str, int] = {  # of a field as JSON
    "tools": 1 << 18,
    "chat_template_kwargs": 1 << 14,
    "suffix": 1 << 16,
}
_MAX_IGNORED_CHARACTERS = 1 << 14
_MIN_TEMPERATURE = 0.001  # scores divided by less can overflow

# ignored: no effect on the answer
_HARMLESS = {"user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls"}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # not supported, but these values have no effect
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto"),
    "modalities": (None, ["text"]),
}


def check_chat(body: Body) -> None:
    """Check a body of /v1/chat/completions; a ValueError names the wrong field and what it must be."""
    _check_fields(body, {"messages", "tools", "max_completion_tokens", "chat_template_kwargs", "logit_bias"})
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        got = f"{len(messages)} of them" if isinstance(messages, list) else kind(messages)
        raise ValueError(f"messages must be a list with 1 to {MAX_MESSAGES} messages, got {got}")
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]")
    tools = body.get("tools")
    if tools is not None:
        _check_tools(tools)
    settings = body.get("chat_template_kwargs")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"chat_template_kwargs must be an object, got {kind(settings)}")
    bias = body.get("logit_bias")
    if bias is not None:
        body["logit_bias"] = _checked_bias(bias)
    _drop_nulls(body)


def check_completion(body: Body) -> None:
    """Check a body of /v1/completions, with errors as `check_chat`."""
    _check_fields(body, {"prompt", "suffix"})
    _check_text(body.get("prompt"), "prompt")
    if body.get("suffix") is not None:
        _check_text(body["suffix"], "suffix")
    _drop_nulls(body)


def check_re_isq(body: Body) -> tuple[str, str | None]:
    """(format, source) in a body of /re_isq. Clients may not name paths, so the only source allowed is "stored"."""
    unknown = sorted(set(body) - {"isq", "source"})
    if unknown:
        raise ValueError(
            f'unknown field {unknown[0][:80]!r}; the body is {{"isq": FORMAT}}, with "source": "stored" if need be'
        )
    isq = body.get("isq")
    if type(isq) is int:
        isq = str(isq)
    if not isinstance(isq, str) or len(isq) > MAX_NAME_CHARACTERS:
        raise ValueError(f"isq must be a format or a number of bits, got {shown(isq)}")
    source = body.get("source")
    if source not in (None, STORED):
        raise ValueError(
            f'source can only be "{STORED}", the quantized weights; leave it out to read the checkpoint again'
        )
    return isq, source


# ---- fields ----------------------------------------------------------------------------------------------------------


def _check_fields(body: Body, own: set[str]) -> None:
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
        "frequency_penalty": (lambda v: _number(v) and -1 < v <= 2, "a number above -1 and up to 2"),
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
        if not isinstance(part, dict) or part.get("type") != "text":
            wrong = shown(part.get("type")) if isinstance(part, dict) else kind(part)
            raise ValueError(f"{where}.content[{i}] is {wrong}; this server takes parts of type 'text' only")
        _check_text(part.get("text"), f"{where}.content[{i}].text")


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


def _check_tools(tools: Any) -> None:
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        got = f"{len(tools)} of them" if isinstance(tools, list) else kind(tools)
        raise ValueError(f"tools must be a list of up to {MAX_TOOLS} tools, got {got}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ValueError(f"tools[{i}] must be an object, got {kind(tool)}")


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


def _drop_nulls(body: Body) -> None:
    """Remove fields that have no effect: transformers reacts to the mere presence of some fields."""
    for name in [name for name, value in body.items() if value is None or name in _NEUTRAL or name in _HARMLESS]:
        del body[name]
    for name in ("stop", "tools", "logit_bias", "chat_template_kwargs"):
        if name in body and len(body[name]) == 0:
            del body[name]


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
