"""An extension of griffe, which reads the docstrings: examples are shown as code, and each argument gets a row."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension

_EXAMPLE = re.compile(r"^Example:\n((?:(?: {4}.*)?\n?)+)", re.M)
_SEVERAL = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*(?:\n {5,}\S.*)*)", re.M)


class Examples(Extension):
    """Puts the part "Example:" of every docstring into a block of code, and divides "a, b: text" of arguments into two."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called for each object that griffe finds."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(_as_code, obj.docstring.value)
            obj.docstring.value = _SEVERAL.sub(_apart, text)


def _as_code(example: re.Match[str]) -> str:
    code = textwrap.dedent(example[1]).strip()
    return f"**Example**\n\n```python\n{code}\n```\n\n"


def _apart(entry: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))
