"""The JSON of a request body. Its size as Python objects and its depth are limited before it is parsed."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

Body = dict[str, Any]

MAX_MARKS = 100_000  # commas, colons and brackets outside of strings; a value takes up to 100 times its length
MAX_DEPTH = 64

_CHUNK = 1 << 16  # bytes looked at together
_QUOTE = ord('"')
_MARK = np.isin(np.arange(256), list(b"{}[],:"))
_STEP = np.zeros(256, dtype=np.int8)  # what a character adds to the depth
_STEP[list(b"{[")] = 1
_STEP[list(b"}]")] = -1


def parse(raw: bytes) -> Body:
    """The JSON object in a body.

    Raises:
        ValueError: it is not JSON, not an object, too deep, has too many values, or has text that is not Unicode.
    """
    try:
        text = raw.decode("utf-8")
        _check_outline(raw)
        body = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON that this server reads: {error}") from None
    if not isinstance(body, dict):
        raise ValueError(f"the body must be a JSON object, got {kind(body)}")
    for name, value in body.items():
        check_unicode(name, "the name of a field")
        check_unicode(value, name)
    return body


def parse_inner(text: str, where: str) -> Any:
    """The JSON in a string of the body, under the same limits; a ValueError names the place."""
    try:
        _check_outline(text.encode("utf-8"))
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON that this server reads: {error}") from None


def check_unicode(value: Any, where: str) -> None:
    """ValueError if a string in a value holds half of a surrogate pair, which no tokenizer can read."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds half of a surrogate pair at character {error.start}; it is not text"
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_unicode(key, where)
            check_unicode(item, where)
    elif isinstance(value, list):
        for item in value:
            check_unicode(item, where)


def kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """The beginning of a value as JSON, for an error."""
    return json.dumps(value)[:80]


def _check_outline(raw: bytes) -> None:
    """ValueError for JSON with too many values or too much nesting."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quote begins or ends a string
    inside, marks, depth = 0, 0, 0
    for start in range(0, len(plain), _CHUNK):  # the arrays of a whole body would be several times its size
        characters = np.frombuffer(plain, dtype=np.uint8, offset=start, count=min(_CHUNK, len(plain) - start))
        quotes = np.cumsum(characters == _QUOTE, dtype=np.int32) + inside
        found = characters[(quotes % 2 == 0) & _MARK[characters]]
        depths = np.cumsum(_STEP[found], dtype=np.int32) + depth
        marks += len(found)
        deepest = int(depths.max(initial=0))
        if marks > MAX_MARKS:
            raise ValueError(f"it has more than {MAX_MARKS} commas, colons and brackets outside of strings")
        if deepest > MAX_DEPTH:
            raise ValueError(f"it is nested {deepest} levels deep; up to {MAX_DEPTH} are read")
        inside = int(quotes[-1]) % 2
        depth = int(depths[-1]) if len(depths) else depth


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
