"""Request: a format and its options, checked and parsed once. Policy, importance and packing all read it."""

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

    label: str  # its name in messages: "exclude pattern 'lm_head'"
    reason: str  # reason in the report for a layer that it excludes
    regex: re.Pattern[str]


class Assigned(NamedTuple):
    """The format that a rule for whole models gives one layer."""

    format: str | int  # a name, or a number of bits, which stands for a format that depends on the layer's device
    why: str  # reason for the report; may be empty


@dataclass(frozen=True)
class Request:
    """A format and options, checked.

    Attributes:
        fmt: the default format; None: quantize only the layers that the topology names.
        options: the options; `topology` is already parsed.
        op: name of the public function, for messages.
        assigned: for "auto", the format chosen for each layer, by layer name.
        topology: the parsed topology; empty if none was given.
        device: the parsed device. Its availability is not checked here.
        included: patterns of layers to quantize; None: every layer.
        excluded: patterns of layers to leave, from `exclude` and `modules_to_not_convert`.

    Raises:
        ValueError: a bad format, topology, organization, fallback, activations, device or pattern.
        OSError: a topology file cannot be read.
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
            object.__setattr__(self, name, value)  # allowed: a frozen record may be filled while it is constructed
        object.__setattr__(self, "options", options.changed(topology=topology))  # so that a YAML file is read only once

    def changed(self, **options: Any) -> Request:
        """A copy with other options."""
        return replace(self, options=self.options.changed(**options))


def parsed_device(device: torch.device | str, what: str) -> torch.device:
    """The torch.device for a name; ValueError for an invalid name. The device need not exist."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{what} {str(device)!r} is not a torch device: {str(error).splitlines()[0]}") from None


def checked_device(device: torch.device | str, what: str) -> torch.device:
    """The torch.device for a name; ValueError unless it is available and can hold values."""
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
    """Regexes that match these names as whole components of a path: "lm_head" does not match "lm_head2"."""
    return [
        Pattern(
            f"modules_to_not_convert entry {name!r}",
            f"excluded by modules_to_not_convert ({name!r})",
            re.compile(rf"(?:^|\.){re.escape(name)}(?:\.|$)"),
        )
        for name in listed(names)
    ]
