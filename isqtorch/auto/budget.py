"""The options of "auto": the largest size, the formats to choose from, and how to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import get_args

from isqtorch.formats import AUTO, Spec, formats, get_format, mix_name, resolve_format
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.options import Options, Probe, parsed_bytes
from isqtorch.text import human_size

AUTO_OPTIONS = ("target_bpw", "max_size", "formats", "probe")
"""Options of `quantize_` that only the format "auto" takes."""


@dataclass(frozen=True)
class Budget:
    """The checked options of "auto"; exactly one of `target_bpw` and `max_bytes` is set.

    The size is that of the report: all weights, quantized or not, with norms, biases and saved buffers; shared weights
    count once. `target_bpw` limits the report's `bits_per_weight`, `max_bytes` its `bytes_after`.
    """

    target_bpw: Fraction | None
    max_bytes: int | None
    formats: tuple[Spec, ...]

    @classmethod
    def of(cls, op: str, fmt: Spec | None, options: Options) -> Budget | None:
        """The checked options of "auto"; None if `fmt` is another format.

        Raises:
            ValueError: an option is missing, has a bad value, or is given for another format than "auto".
        """
        if mix_name(fmt) != AUTO:
            extra = [name for name in AUTO_OPTIONS if getattr(options, name) is not None]
            if extra:
                raise ValueError(f"{op}: {extra[0]} is for the format 'auto', and the format is {fmt!r:.200}")
            return None
        bpw, size, probe = options.target_bpw, options.max_size, options.probe
        if (bpw is None) == (size is None):
            raise ValueError(f"{op}: 'auto' needs one of target_bpw=4.5 (bits per weight) and max_size='6GB'")
        if bpw is not None and not _is_positive(bpw):
            raise ValueError(f"{op}: target_bpw must be a positive number, got {bpw!r:.200}")
        if probe is not None and probe not in get_args(Probe):
            raise ValueError(f"{op}: probe must be one of {', '.join(get_args(Probe))}; got {probe!r:.200}")
        return cls(
            None if bpw is None else Fraction(bpw),
            None if size is None else parsed_bytes(op, "max_size", size),
            _allowed(op, options.formats),
        )

    def bytes_for(self, inventory: Inventory) -> int:
        """Largest size of the model in bytes."""
        if self.target_bpw is None:
            assert self.max_bytes is not None
            return self.max_bytes
        return int(self.target_bpw * inventory.numel / 8)

    def __str__(self) -> str:
        if self.target_bpw is not None:
            return f"{float(self.target_bpw):g} bits per weight"
        assert self.max_bytes is not None
        return human_size(self.max_bytes)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float, Fraction)) and not isinstance(value, bool) and 0 < value < inf


def _allowed(op: str, allowed: Sequence[Spec] | None) -> tuple[Spec, ...]:
    if allowed is None:  # numbers of bits: each means the best format for a layer's device
        return tuple(sorted({get_format(name).bits for name in formats()}))
    if isinstance(allowed, (str, bytes)) or not isinstance(allowed, Sequence) or not allowed:
        raise ValueError(f"{op}: formats must be a list of formats to choose from, got {allowed!r:.200}")
    try:
        for spec in allowed:
            resolve_format(spec)
    except ValueError as error:
        raise ValueError(f"{op}: formats: {error}") from None
    return tuple(dict.fromkeys(allowed))
