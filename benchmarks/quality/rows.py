"""What the quality table has a row for, as data: a format spec and how it is quantized.

A row is spelled `SPEC[+imatrix][+RULE][+OPTION=VALUE]...`: "q4k+imatrix", "afq3+search+imatrix", "q8_0+fallback=skip". With
the rule "feedback", the importance matrix has the second moments of the same text. "auto" with an importance matrix
measures on that text. SPEC and the options are whatever
`isqtorch.quantize_` accepts, so a new recipe needs no line here; besides, `refine=STEPS` calls `isqtorch.refine_` on the
calibration text. `default` has the rows of the demo model,
`for_real_models` fewer, because these take a hundred times as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from isqtorch.formats import formats, get_format
from isqtorch.quantizers import has_rule, uses_importance

ALSO = (
    *("q3k_m+imatrix", "q4k_m+imatrix", "q5k_m+imatrix"),
    *(f"auto+target_bpw={bpw}+imatrix" for bpw in (3.0, 3.5, 4.0, 4.5, 5.5)),
)
"""Rows besides those of the registry's formats."""

_SCRATCH = ("q8_1", "q8k")  # ggml's for activations: larger than q8_0 or as good


@dataclass(frozen=True)
class Row:
    """One way to quantize a model."""

    spec: str
    imatrix: bool = False
    rule: str | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # of quantize_

    @classmethod
    def parse(cls, text: str) -> Row:
        """The inverse of `name`; ValueError for what cannot be one."""
        spec, *parts = (part.strip() for part in text.split("+"))
        if not spec or not all(parts):
            raise ValueError(f"a row is SPEC[+imatrix][+RULE][+OPTION=VALUE]..., got {text!r}")
        words = [part for part in parts if "=" not in part and part != "imatrix"]
        if len(words) > 1:
            raise ValueError(f"row {text!r}: more than one rule: {', '.join(words)}")
        pairs = (part.split("=", 1) for part in parts if "=" in part)
        options = {key: _number(value) for key, value in pairs}
        return cls(spec, "imatrix" in parts, words[0] if words else None, options)

    @property
    def how(self) -> str:
        """Everything but the spec: "", "imatrix", "search+imatrix", ..."""
        options = [f"{key}={value}" for key, value in self.options.items()]
        return "+".join([*filter(None, [self.rule]), *options, *["imatrix"] * self.imatrix])

    @property
    def name(self) -> str:
        return "+".join(filter(None, [self.spec, self.how]))


def _number(text: str) -> float | str:
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def default() -> list[Row]:
    """Every format, plain, with whatever importance and search change, and with error feedback; then `ALSO`."""
    rows = []
    for name in formats():
        if name in _SCRATCH:
            continue
        fmt = get_format(name)
        for rule in (None, "search"):
            if has_rule(fmt, rule):
                rows += [Row(name, imatrix, rule) for imatrix in (False, True)[: 1 + uses_importance(fmt, rule)]]
        if fmt.bits < 8:
            rows.append(Row(name, True, "feedback"))
    return rows + [Row.parse(text) for text in ALSO]


_REAL = (
    "q2k",
    "q3k",
    "q4_0",
    "q4k",
    "q5k",
    "q6k",
    "q8_0",
    "iq4_nl",
    "iq4_xs",
    "mxfp4",
    "afq3",
    "afq4",
    "afq8",
    "hqq4",
    "fp8",
)


def for_real_models() -> list[Row]:
    """Fifteen formats, plain, and those below 8 bits with an importance matrix and with error feedback; and "auto"."""
    rows = []
    for name in _REAL:
        fmt = get_format(name)
        rule = "search" if has_rule(fmt, "search") else None
        rows.append(Row(name))
        if fmt.bits < 8:
            rows += [Row(name, True, rule)] * uses_importance(fmt, rule) + [Row(name, True, "feedback")]
    return rows + [Row("auto", True, rule, {"target_bpw": 4.5}) for rule in (None, "feedback")]
