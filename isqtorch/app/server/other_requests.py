"""Checks of the bodies of the smaller endpoints, with errors as those of requests.py."""

from __future__ import annotations

from typing import Any

from isqtorch.inplace.weights import STORED

from .body import Body, kind, shown
from .requests import (
    MAX_NAME_CHARACTERS,
    check_fields,
    check_ids,
    check_messages,
    check_template_settings,
    check_tools,
    checked_texts,
    drop_nulls,
)

_SAMPLING = {"model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "user", "metadata", "store"}
_PENALTIES = {"frequency_penalty", "presence_penalty", "repetition_penalty", "service_tier", "parallel_tool_calls"}
MAX_FOLDER_CHARACTERS = 256


def check_response(body: Body) -> None:
    """Check a body of /v1/responses."""
    own = {
        "input",
        "instructions",
        "max_output_tokens",
        "tools",
        "tool_choice",
        "chat_template_kwargs",
        "text",
        "truncation",
    }
    known_fields(body, own | _SAMPLING | _PENALTIES, "/v1/responses")
    text, tokens = body.pop("text", None), body.pop("max_output_tokens", None)
    if text not in (None, {}, {"format": {"type": "text"}}):
        raise ValueError(f"text = {shown(text)} is not supported here; /v1/chat/completions has response_format")
    if body.pop("truncation", None) not in (None, "disabled"):
        raise ValueError("this server does not shorten conversations; leave out truncation")
    if tokens is not None:
        body["max_tokens"] = tokens
    choice = body.pop("tool_choice", None)
    if choice not in (None, "auto"):
        raise ValueError(f'tool_choice can be "auto", got {shown(choice)}')
    given, instructions = body.get("input"), body.get("instructions")
    if not isinstance(given, (str, list)) or not given:
        raise ValueError(f"input must be a string or a list of items, got {kind(given)}")
    if isinstance(given, list) and not all(isinstance(item, dict) for item in given):
        raise ValueError("input must be a list of objects")
    if instructions is not None and not isinstance(instructions, str):
        raise ValueError(f"instructions must be a string, got {kind(instructions)}")
    check_tools(body.get("tools"))
    check_template_settings(body.get("chat_template_kwargs"))
    check_fields(body, {"input", "instructions", "tools", "chat_template_kwargs"})
    drop_nulls(body)
    if "max_tokens" in body:
        body["max_output_tokens"] = body.pop("max_tokens")


def check_embeddings(body: Body) -> None:
    """Check a body of /v1/embeddings; `input` becomes a list."""
    known_fields(body, {"model", "input", "encoding_format", "user", "dimensions"}, "/v1/embeddings")
    _check_model(body)
    body["input"] = checked_texts(body.get("input"), "input")
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise ValueError(f'encoding_format must be "float" or "base64", got {shown(body["encoding_format"])}')
    if body.get("dimensions") is not None:
        raise ValueError("dimensions is not supported: the vectors have the size of the model's states")


def check_tokenize(body: Body) -> None:
    """Check a body of /tokenize; a text is in `prompt` afterwards."""
    own = {"model", "prompt", "content", "messages", "add_special_tokens", "tools", "chat_template_kwargs"}
    known_fields(body, own, "/tokenize")
    _check_model(body)
    if "content" in body:  # the name that llama.cpp's server has
        body.setdefault("prompt", body.pop("content"))
    if ("messages" in body) == ("prompt" in body):
        raise ValueError("give prompt, a string, or messages")
    if "messages" in body:
        check_messages(body["messages"], "messages")
    elif not isinstance(body["prompt"], str):
        raise ValueError(f"prompt must be a string, got {kind(body['prompt'])}")
    if not isinstance(body.get("add_special_tokens", True), bool):
        raise ValueError("add_special_tokens must be true or false")
    check_tools(body.get("tools"))
    check_template_settings(body.get("chat_template_kwargs"))
    for name in [name for name, value in body.items() if value is None]:
        del body[name]


def check_detokenize(body: Body) -> None:
    """Check a body of /detokenize."""
    known_fields(body, {"model", "tokens"}, "/detokenize")
    _check_model(body)
    check_ids(body.get("tokens"), "tokens")


def check_re_isq(body: Body) -> tuple[str, str | None]:
    """(format, source) in a body of /re_isq. Clients may not name paths, so the only source allowed is "stored"."""
    unknown = sorted(set(body) - {"isq", "source"})
    if unknown:
        raise ValueError(
            f'unknown field {unknown[0][:80]!r}; the body is {{"isq": FORMAT}}, with "source": "stored" if need be'
        )
    source = body.get("source")
    if source not in (None, STORED):
        raise ValueError(
            f'source can only be "{STORED}", the quantized weights; leave it out to read the checkpoint again'
        )
    return checked_format(body.get("isq")), source


def checked_format(isq: Any) -> str:
    """A format, which may be given as a number of bits."""
    if type(isq) is int:
        isq = str(isq)
    if not isinstance(isq, str) or len(isq) > MAX_NAME_CHARACTERS:
        raise ValueError(f"isq must be a format or a number of bits, got {shown(isq)}")
    return isq


def known_fields(body: Body, known: set[str], endpoint: str) -> None:
    """ValueError for a field that an endpoint does not know."""
    unknown = sorted(set(body) - known)
    if unknown:
        raise ValueError(f"unknown field {unknown[0][:80]!r}; {endpoint} takes {', '.join(sorted(known)) or 'none'}")


def _check_model(body: Body) -> None:
    model = body.get("model")
    if model is not None and not (isinstance(model, str) and len(model) <= MAX_NAME_CHARACTERS):
        raise ValueError(f"model must be a string of up to {MAX_NAME_CHARACTERS} characters")
