"""Options of other libraries, for error messages: what was probably meant, and its name here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_FLOAT = "the float type in which a model computes is the dtype of from_pretrained"
_LEFT = "exclude=... names the layers to leave as they are"
_TEXT = "calibration_file=... is the text to calibrate on"
_SOLVED = "there is no such option here; importance (imatrix=..., calibration_file=...) tells which columns matter"

_OPTIONS: dict[str, str] = {
    "group_size": 'a group size is a part of the format: "afq4g32" has groups of 32, and isqtorch.formats(variants=True) lists all',
    "dtype": _FLOAT,
    "torch_dtype": _FLOAT,
    "compute_dtype": _FLOAT,
    "device_map": "device=... of quantize_, or device_map=... of from_pretrained",
    "dataset": _TEXT,
    "calib_data": _TEXT,
    "calibration_data": _TEXT,
    "calibration_dataset": _TEXT,
    "importance": "imatrix=... is a file or dict with the importance of columns",
    "importance_matrix": "imatrix=... is a file or dict with the importance of columns",
    "damp_percent": _SOLVED,
    "desc_act": _SOLVED,
    "act_order": _SOLVED,
    "true_sequential": _SOLVED,
    "sym": 'whether blocks have an offset is a part of the format: "q4_0" has none, "q4k" has one',
    "symmetric": 'whether blocks have an offset is a part of the format: "q4_0" has none, "q4k" has one',
    "zero_point": 'whether blocks have an offset is a part of the format: "q4_0" has none, "q4k" has one',
    "llm_int8_threshold": "there is no such option here: inputs are not split by size",
    "modules_to_save": _LEFT,
    "llm_int8_skip_modules": _LEFT,
    "skip_modules": _LEFT,
    "ignore": _LEFT,
    "ignored_layers": _LEFT,
    "target_modules": "include=... names the layers to quantize",
    "targets": "include=... names the layers to quantize",
    "mixture": 'a mix is a format: "q4k_m"',
    "bpw": 'target_bpw=..., with "auto"',
    "verbose": "progress=True",
    "inplace": "quantize_ always works in place",
}
_FORMAT = "bits nbits n_bits w_bit wbits num_bits quant_type qtype quant weights weight_dtype format fmt isq scheme method".split()
_PREFIXES = re.compile(r"^(?:bnb_4bit_|bnb_|q_|llm_|gptq_|awq_|hqq_)+")


def explaining(format: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function: a keyword argument that it does not have is a TypeError that says what was meant.

    The signature stays as it is, so type checkers find such arguments, too.

    Args:
        format: how the function takes a format: "quantize_(model, {})".
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = list(inspect.signature(function).parameters)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            unknown = [name for name in kwargs if name not in known]
            if unknown:
                name = unknown[0]
                raise TypeError(f"{function.__name__}: {about(name, kwargs[name], known, format)}")
            return function(*args, **kwargs)

        return call

    return decorate


def about(name: str, value: object, options: Iterable[str], format: str) -> str:
    """Say that an option does not exist, and what was probably meant.

    Args:
        name: the option.
        value: its value.
        options: names of the options that there are.
        format: how a format is given: "quantize_(model, {})".
    """
    options = list(options)
    plain = _PREFIXES.sub("", name)
    close = get_close_matches(name, options, n=1, cutoff=0.75)
    if name in ("load_in_4bit", "load_in_8bit"):
        return f"unknown option {name!r}, of bitsandbytes. Here it is {format.format(name[8])}."
    if close and close[0] != name:
        return f"unknown option {name!r}. Did you mean {close[0]!r}?"
    if plain in _FORMAT:
        given = value if isinstance(value, int) and not isinstance(value, bool) else 4
        return (
            f"unknown option {name!r}. The format, a name or a number of bits, is an argument: {format.format(given)}."
        )
    hint = _OPTIONS.get(name) or _OPTIONS.get(plain)
    if hint is not None:
        return f"unknown option {name!r}: {hint}."
    return f"unknown option {name!r}. Options are {', '.join(options)}."
