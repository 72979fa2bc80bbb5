"""The ways a user may specify a format: a name, or a number of bits, which selects a format for the device."""

from __future__ import annotations

import torch

from .base import QuantFormat, formats, get_format, register_mix

Spec = int | str | QuantFormat
"""A number of bits, a name, or a format."""

AUTO = "auto"  # the rule that measures the layers and chooses (isqtorch.auto)
KEEP = "keep"  # the rule that takes over what a checkpoint has quantized already
_BY_BITS = {2: "q2k", 3: "q3k", 4: "q4k", 5: "q5k", 6: "q6k", 8: "q8_0"}
_BY_BITS_MPS = {2: "afq2", 3: "afq3", 4: "afq4", 5: "q5k", 6: "afq6", 8: "afq8"}


def bits_asked(spec: object) -> int | None:
    """The number of bits, if a specification is one, also as text; else None."""
    if isinstance(spec, str) and spec.isdecimal():
        return int(spec)
    return spec if isinstance(spec, int) and not isinstance(spec, bool) else None


def resolve_format(spec: int | str | QuantFormat, device: str | torch.device = "cpu") -> QuantFormat:
    """Convert a user's specification to a format.

    Args:
        spec: a name, a format, or a number of bits: 2, 3, 4, 5, 6 or 8 (also as text, "4").
        device: where the weight will be used. With a number of bits, MPS gets an AFQ format (q5k for 5 bits), other
            devices get a ggml format.

    Returns:
        The format.

    Raises:
        ValueError: the name is unknown, or no format has this number of bits.

    Example:
        print(isqtorch.resolve_format(4).name, isqtorch.resolve_format(4, "mps").name)  # q4k afq4
    """
    if isinstance(spec, bool) or not isinstance(spec, (int, str, QuantFormat)):
        raise ValueError(f"format must be a name or a number of bits, got {_shown(spec)}")
    if isinstance(spec, str) and spec.isdecimal():
        spec = int(spec)
    if isinstance(spec, int):
        table = _BY_BITS_MPS if torch.device(device).type == "mps" else _BY_BITS
        if spec not in table:
            raise ValueError(
                f"no format has {spec} bits. Use one of {', '.join(map(str, table))}, or a name: {', '.join(formats())}."
            )
        spec = table[spec]
    return get_format(spec)


def _shown(spec: object) -> str:
    """What was given in the place of a format, on one line. The text of a model has thousands."""
    if isinstance(spec, float):
        return f'{spec}. For an average of so many bits, give "auto" and target_bpw={spec}'
    return f"{spec!r:.200}" if isinstance(spec, (bool, bytes, torch.dtype, type(None))) else type(spec).__name__


def repacked_as(bits: float) -> QuantFormat:
    """Return the format in which to pack values anew that another program has quantized in a type without a format here.

    It is the one with the fewest bits that adds little to the error that the values have: types of 1 to 2 bits are 25
    to 40 % off the original weights, and q4k adds 0.1 to 5 %; types of 3 bits are 15 % off, and q5k adds 2.5 %; types
    of 4 bits are 8 to 12 % off, and q6k adds 1.4 to 1.6 %.

    Args:
        bits: bits of a weight in that type.
    """
    return get_format(next((name for most, name in ((3, "q4k"), (4, "q5k"), (5, "q6k")) if bits < most), "q8_0"))


register_mix(AUTO)
register_mix(KEEP)
