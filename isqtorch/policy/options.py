"""Options: all options of quantize_, requantize_, plan and IsqConfig besides the format, in one record.

The public functions list their options as keyword arguments, which editors can show, and pass them on as this record. A
new option needs a field here, the code that uses it, and an argument in each function that offers it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from isqtorch.formats import Spec
from isqtorch.quantizers import Rule
from isqtorch.quantizers.families import FEEDBACK

from .topology import TopologyLike

Organization = Literal["default", "moqe"]
Fallback = Literal["up", "skip", "error"]
Activations = Literal["fp8"]
Probe = Literal["kl", "output"]
ModelRule = Rule | Literal["feedback"]
RULES = (*get_args(Rule), FEEDBACK)
Names = Sequence[str] | str
MAX_NAMES = 1 << 15  # of one option; each is tried on every layer
CalibrationLike = str | os.PathLike[str] | Tensor | Sequence[int]
"""A calibration text: "self" lets the model write it; else the path of a text file, or token ids."""
ImatrixLike = Mapping[str, Tensor] | str | os.PathLike[str]
"""An importance matrix: an `Imatrix` or dict from layer names to vectors f32 [K], or the path of a file."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options as the user gave them; `quantize_` documents each.

    Attributes:
        modules_to_not_convert: layers and modules to leave as they are, by whole components of their paths. The name is
            that of transformers.
    """

    topology: TopologyLike | None = None
    organization: Organization = "default"
    include: Names | None = None
    exclude: Names | None = None
    modules_to_not_convert: Names | None = None
    fallback: Fallback = "up"
    device: torch.device | str | None = None
    imatrix: ImatrixLike | None = None
    calibration: CalibrationLike | None = None
    calibration_file: CalibrationLike | None = None  # a Request puts the text of either spelling here, checked
    tokenizer: Any = None
    rule: ModelRule | None = None
    max_memory: int | str | None = None
    activations: Activations | None = None
    target_bpw: float | None = None
    max_size: int | str | None = None
    formats: Sequence[Spec] | None = None
    probe: Probe | None = None
    progress: bool | None = None
    measure_error: bool = False

    def lasting(self, **given: Any) -> Options:
        """The options that a later `requantize_` keeps: those that select layers.

        Values in `given` replace them, unless None. An empty value drops an option that may be None. A new `exclude`
        also replaces `modules_to_not_convert`.
        """
        kept = {name: getattr(self, name) for name in LASTING}
        changed = {name: value for name, value in given.items() if value is not None}
        if "exclude" in changed:
            kept["modules_to_not_convert"] = None
        for name in ("topology", "include", "exclude"):
            if isinstance(changed.get(name), Sized) and not changed[name]:
                changed[name] = None
        return Options(**(kept | changed))

    def changed(self, **options: Any) -> Options:
        """A copy with other values."""
        return replace(self, **options)


LASTING = ("topology", "organization", "include", "exclude", "modules_to_not_convert", "fallback")
"""The options that select layers and formats, and not how the weights are packed."""


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_MOST_BYTES = 1 << 62
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)


def parsed_bytes(op: str, option: str, size: int | str) -> int:
    """Bytes from a number or a string such as "6GB", "800 MB" or "5.5GiB".

    Raises:
        ValueError: it is neither.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is not None:
        size = int(Fraction(match[1]) * _UNITS[match[2].upper()]) if match[2].upper() in _UNITS else 0
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= _MOST_BYTES:
        raise ValueError(
            f"{op}: {option} must be a number of bytes or a string such as '6GB' or '5.5GiB', got {size!r:.80}"
        )
    return size


def checked_names(op: str, option: str, names: Names | None) -> list[str]:
    """Names as a list; a single string is one name, and "" is none.

    Raises:
        ValueError: an entry is no string or is empty, or there are too many to be tried.
    """
    if isinstance(names, str) and not names:
        return []
    try:
        found = listed(names)
    except ValueError as error:
        raise ValueError(f"{op}: {option}: {error}") from None
    if len(found) > MAX_NAMES:
        raise ValueError(
            f"{op}: {option} has {len(found)} entries, the limit is {MAX_NAMES}. Join entries: one regex matches many layers."
        )
    if "" in found:
        raise ValueError(
            f"{op}: {option} has an empty entry, which would match every layer. Leave it out, or write '.*'."
        )
    return found


def listed(names: Names | None) -> list[str]:
    """Names as a list; a single string is one name. ValueError for anything else: config.json may hold any type."""
    if names is None:
        return []
    found = [names] if isinstance(names, str) else names
    if not isinstance(found, Iterable) or isinstance(found, (bytes, Mapping)):
        raise ValueError(f"must be a string or a list of strings, got {names!r:.200}")
    found = list(found)
    wrong = [name for name in found if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"must be a string or a list of strings, got {wrong[0]!r:.200} in the list")
    return found
