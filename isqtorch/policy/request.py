"""Request: what the user asked for, checked and parsed once. The policy, the importance and the packing read it from here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

import torch

from isqtorch.formats import Spec, mix_name, resolve_format

from .options import Activations, Fallback, Names, Options, Organization, listed
from .topology import Topology


class Pattern(NamedTuple):
    """A regex that chooses layers by their paths."""

    label: str  # what messages call it: "exclude pattern 'lm_head'"
    reason: str  # why a layer that it excludes is left
    regex: re.Pattern[str]


class Assigned(NamedTuple):
    """What a rule for whole models gives one layer."""

    format: str | int  # a name, or a number of bits that the layer's device makes a format of
    why: str  # "" where it needs no explanation


@dataclass(frozen=True)
class Request:
    """A format and options, checked.

    Attributes:
        fmt: the format that was asked for; None: only what the topology names.
        options: as the user gave them.
        op: the function that was called, for messages.
        assigned: what was chosen layer by layer where `fmt` is "auto", by layer name.
        topology: parsed.
        device: parsed; whether it is there is not checked.
        included: None: every layer.

    Raises:
        ValueError: a bad format, topology, organization, fallback, activations, device or pattern.
        OSError: a topology file that cannot be read.
    """

    fmt: Spec | None
    options: Options = field(default_factory=Options)
    op: str = "quantize_"
    assigned: Mapping[str, Assigned] | None = None
    topology: Topology = field(init=False)
    device: torch.device | None = field(init=False)
    included: list[Pattern] | None = field(init=False)
    excluded: list[Pattern] = field(init=False)

    def __post_init__(self) -> None:
        op, options = self.op, self.options
        if self.fmt is not None:
            if mix_name(self.fmt) is None:
                resolve_format(self.fmt)
        elif not options.topology:
            raise ValueError(f"{op}: there is neither a format nor a topology, so nothing to do")
        for option, known in (("organization", Organization), ("fallback", Fallback)):
            if getattr(options, option) not in get_args(known):
                raise ValueError(
                    f"{op}: {option} must be one of {', '.join(get_args(known))}; got {getattr(options, option)!r}"
                )
        if options.activations not in (None, *get_args(Activations)):
            raise ValueError(f'{op}: activations must be None or "fp8"; got {options.activations!r}')
        topology = Topology.load({} if options.topology is None else options.topology)
        parsed: dict[str, Any] = {
            "topology": topology,
            "device": None if options.device is None else parsed_device(options.device, f"{op}: device"),
            "included": None if options.include is None else _patterns(op, "include", options.include),
            "excluded": [*_patterns(op, "exclude", options.exclude), *_exact(options.modules_to_not_convert)],
        }
        for name, value in parsed.items():
            object.__setattr__(self, name, value)  # the record is frozen, and this is its construction
        object.__setattr__(self, "options", options.changed(topology=topology))  # a file is read once

    def changed(self, **options: Any) -> Request:
        """A copy with other options."""
        return replace(self, options=self.options.changed(**options))


def parsed_device(device: torch.device | str, what: str) -> torch.device:
    """A device that torch understands, whether or not it is there."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{what} {str(device)!r} is not a torch device: {str(error).splitlines()[0]}") from None


def checked_device(device: torch.device | str, what: str) -> torch.device:
    """A device that is there and holds values."""
    checked = parsed_device(device, what)
    if checked.type == "meta":
        raise ValueError(f"{what} 'meta' holds no weights; isqtorch.plan predicts sizes without them")
    try:
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise ValueError(f"{what} {str(device)!r} is not available: {str(error).splitlines()[0]}") from None
    return checked


def _patterns(op: str, option: str, names: Names | None) -> list[Pattern]:
    """Compiled regexes, searched in the full module path."""
    compiled = []
    for pattern in listed(names):
        try:
            compiled.append(Pattern(f"{option} pattern {pattern!r}", f"excluded by {pattern!r}", re.compile(pattern)))
        except (re.error, TypeError) as error:
            raise ValueError(f"{op}: {option} pattern {pattern!r} is not a regex: {error}") from None
    return compiled


def _exact(names: Names | None) -> list[Pattern]:
    """Regexes that find these runs of components in a path, and nothing that merely begins like them."""
    return [
        Pattern(
            f"modules_to_not_convert entry {name!r}",
            f"excluded by modules_to_not_convert ({name!r})",
            re.compile(rf"(?:^|\.){re.escape(name)}(?:\.|$)"),
        )
        for name in listed(names)
    ]
