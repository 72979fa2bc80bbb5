"""Request: a format and its options, checked and parsed once. Policy, importance and packing all read it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from isqtorch.formats import Spec, mix_name, resolve_format
from isqtorch.quantizers.families import FEEDBACK

from .options import RULES, Activations, Fallback, Names, Options, Organization, checked_names, parsed_bytes
from .patterns import PathRegex, Patience
from .topology import Topology


class Pattern(NamedTuple):
    """A regex that chooses layers by their paths."""

    label: str  # its name in messages: "exclude pattern 'lm_head'"
    reason: str  # reason in the report for a layer that it excludes
    regex: PathRegex


class Assigned(NamedTuple):
    """The format that a rule for whole models gives one layer."""

    format: str | int  # a name, or a number of bits, which stands for a format that depends on the layer's device
    why: str  # reason for the report; may be empty


@dataclass(frozen=True)
class Request:
    """A format and options, checked.

    Attributes:
        fmt: the default format; None: quantize only the layers that the topology names.
        options: the options; `topology` is already parsed, and a calibration text is in `calibration_file`,
            in either spelling: "self", a Path, or token ids.
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
                    f"{op}: {option} must be one of {', '.join(get_args(known))}; got {getattr(options, option)!r:.200}"
                )
        if options.activations not in (None, *get_args(Activations)):
            raise ValueError(f'{op}: activations must be None or "fp8"; got {options.activations!r:.200}')
        if options.rule not in (None, *RULES):
            raise ValueError(
                f"{op}: rule must be None, which is the default of each format, or one of {', '.join(RULES)}; "
                f"got {options.rule!r:.80}"
            )
        if options.max_memory is not None:
            parsed_bytes(op, "max_memory", options.max_memory)
            if options.rule != FEEDBACK:
                raise ValueError(f"{op}: max_memory is for rule='feedback', whose moments it limits")
        topology = Topology.load({} if options.topology is None else options.topology)
        patience = topology.patience
        patience.renew()
        all_names = options.include is None or (isinstance(options.include, str) and not options.include)
        parsed: dict[str, Any] = {
            "topology": topology,
            "device": None if options.device is None else parsed_device(options.device, f"{op}: device"),
            "included": None if all_names else _patterns(op, "include", options.include, patience),
            "excluded": [
                *_patterns(op, "exclude", options.exclude, patience),
                *_exact(op, options.modules_to_not_convert, patience),
            ],
        }
        for name, value in parsed.items():
            object.__setattr__(self, name, value)  # allowed: a frozen record may be filled while it is constructed
        calibration = checked_calibration(op, options)
        options = options.changed(topology=topology, calibration=None, calibration_file=calibration)
        object.__setattr__(self, "options", options)  # so that a YAML file is read only once

    def changed(self, **options: Any) -> Request:
        """A copy with other options."""
        return replace(self, options=self.options.changed(**options))


def checked_calibration(op: str, options: Options) -> Literal["self"] | Path | Tensor | None:
    """The calibration text of either spelling: "self", the path of a file, token ids `[T]` or `[S, T]`, or None.

    Raises:
        ValueError: both spellings are given, or it is none of these.
    """
    given = options.calibration
    if options.calibration_file is not None:
        if given is not None:
            raise ValueError(f"{op}: give either calibration or calibration_file, which is another spelling, not both")
        given = options.calibration_file  # a request that is made of a checked one may hold what is no path
        given = Path(given) if isinstance(given, str) and given != "self" else given
    if given is None or isinstance(given, Path):
        return given
    if isinstance(given, (str, os.PathLike)):
        if not os.fspath(given):
            raise ValueError(f"{op}: calibration is an empty path. Give 'self', the path of a text, or token ids.")
        return "self" if isinstance(given, str) and given == "self" else Path(given)
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if (
        not ids.numel()
        or ids.ndim not in (1, 2)
        or ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
    ):
        raise ValueError(
            f"{op}: calibration must be 'self', which lets the model write a text, the path of a text, or token ids [T] or "
            f"[windows, T]; got {given!r:.80}"
        )
    return ids


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


def _patterns(op: str, option: str, names: Names | None, patience: Patience) -> list[Pattern]:
    """Compiled regexes, searched in the full module path."""
    return [
        Pattern(
            f"{option} pattern {pattern!r:.200}",
            f"excluded by {pattern!r:.200}",
            PathRegex(pattern, f"{op}: {option} pattern {pattern!r:.200}", patience),
        )
        for pattern in checked_names(op, option, names)
    ]


def _exact(op: str, names: Names | None, patience: Patience) -> list[Pattern]:
    """Regexes that match these names as whole components of a path: "lm_head" does not match "lm_head2"."""
    option = "modules_to_not_convert"
    return [
        Pattern(
            f"{option} entry {name!r:.200}",
            f"excluded by {option} ({name!r:.200})",
            PathRegex(rf"(?:^|\.){re.escape(name)}(?:\.|$)", f"{op}: {option} entry {name!r:.200}", patience),
        )
        for name in checked_names(op, option, names)
    ]
