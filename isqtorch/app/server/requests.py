"""Checks of request bodies.

transformers' handlers ignore fields they do not support, and fail late or not at all on values of a wrong type. Here
every field is either known and checked, or refused with a clear message.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from isqtorch.inplace.weights import STORED

Body = dict[str, Any]

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
_MAX_STOPS = 16


def parse(raw: bytes) -> Body:
    """The JSON object in a body; ValueError if it is not one."""
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ValueError(f"the body must be a JSON object, got {_kind(body)}")
    return body


def check_chat(body: Body) -> None:
    """Check a body of /v1/chat/completions; a ValueError names the wrong field and what it must be."""
    _check_fields(body, {"messages", "tools", "max_completion_tokens", "chat_template_kwargs", "logit_bias"})
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list with at least one message, got {_kind(messages)}")
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]")
    for name, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if body.get(name) is not None and not isinstance(body[name], kind):
            raise ValueError(f"{name} must be {'a list' if kind is list else 'an object'}, got {_kind(body[name])}")
    bias = body.get("logit_bias")
    if bias is not None and not (
        isinstance(bias, dict) and all(key.isdecimal() and _number(value) for key, value in bias.items())
    ):
        raise ValueError("logit_bias must map token ids to numbers")
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
            f'unknown field {unknown[0]!r}; the body is {{"isq": FORMAT}}, with "source": "stored" if need be'
        )
    isq = body.get("isq")
    if type(isq) is int:
        isq = str(isq)
    if not isinstance(isq, str):
        raise ValueError(f"isq must be a format or a number of bits, got {_kind(isq)}")
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
        "model": (lambda v: isinstance(v, str), "a string"),
        "stream": (lambda v: isinstance(v, bool), "true or false"),
        "max_tokens": (_positive, "a positive number of tokens"),
        "max_completion_tokens": (_positive, "a positive number of tokens"),
        "temperature": (lambda v: _number(v) and 0 <= v <= 10, "a number from 0 to 10"),
        "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number above 0 and up to 1"),
        "frequency_penalty": (lambda v: _number(v) and -1 < v <= 2, "a number above -1 and up to 2"),
        "seed": (lambda v: type(v) is int and abs(v) < 1 << 63, "a 64-bit integer"),
        "stop": (_stops, f"a string, or up to {_MAX_STOPS} of them, none empty"),
    }
    for name, value in body.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ValueError(f"{name} = {json.dumps(value)[:80]} is not supported by this server; leave it out")
        elif name in checks and (name in own or name != "max_completion_tokens"):
            good, wanted = checks[name]
            if value is not None and not good(value):
                raise ValueError(f"{name} must be {wanted}, got {json.dumps(value)[:80]}")
        elif name not in own and name not in _HARMLESS:
            raise ValueError(f"unknown field {name!r}")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} must be an object with a 'role' and a 'content'")
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None:
        functions = [call.get("function") if isinstance(call, dict) else None for call in _list(calls)]
        if not functions or not all(isinstance(f, dict) and "name" in f and "arguments" in f for f in functions):
            raise ValueError(
                f"{where}.tool_calls must be a list of objects with a function, its name and its arguments"
            )
        return
    if isinstance(content, str):
        _check_text(content, f"{where}.content")
        return
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where}.content must be a string or a list of parts, got {_kind(content)}")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise ValueError(f"{where}.content[{i}] is {kind!r}; this server takes parts of type 'text' only")
        _check_text(part.get("text"), f"{where}.content[{i}].text")


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}; it is not text") from None


def _drop_nulls(body: Body) -> None:
    """Remove fields that are null, neutral or harmless: transformers reacts to the mere presence of some fields."""
    for name in [name for name, value in body.items() if value is None or name in _NEUTRAL or name in _HARMLESS]:
        del body[name]


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _stops(value: Any) -> bool:
    items = [value] if isinstance(value, str) else _list(value)
    return 0 < len(items) <= _MAX_STOPS and all(isinstance(item, str) and item for item in items)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
