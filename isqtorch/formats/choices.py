"""The ways a user may specify a format: a name, or a number of bits, which selects a format for the device and layer."""

from __future__ import annotations

import torch

from .base import QuantFormat, formats, get_format, register_mix

Spec = int | str | QuantFormat
"""A number of bits, a name, or a format."""

AUTO = "auto"  # the rule that measures the layers and chooses (isqtorch.auto)
KEEP = "keep"  # the rule that takes over what a checkpoint has quantized already
SLACK = 0.6  # a format meets a number of bits if its scales and offsets add no more than this
_BY_BITS = {
    2: ("q2k", "afq2", "afq2g32"),
    3: ("q3k", "afq3", "afq3g32"),
    4: ("q4k", "iq4_nl"),
    5: ("q5k", "q5_0"),
    6: ("q6k", "afq6", "afq6g32"),
    8: ("q8_0",),
}
"""Formats for a number of bits, the best first; the first whose block divides the columns of a layer is taken.

The order is that of the measured errors of weights of small models (docs/quality.md).
"""
_BY_BITS_MPS = {
    2: ("afq2", "afq2g32"),
    3: ("afq3", "afq3g32"),
    4: ("afq4", "iq4_nl"),
    5: ("q5k", "q5_0"),
    6: ("afq6", "afq6g32"),
    8: ("afq8", "q8_0"),
}


def resolve_format(
    spec: int | str | QuantFormat, device: str | torch.device = "cpu", columns: int | None = None
) -> QuantFormat:
    """Convert a user's specification to a format.

    Args:
        spec: a name, a format, or a number of bits: 2, 3, 4, 5, 6 or 8 (also as text, "4").
        device: where the weight will be used. With a number of bits, MPS gets an AFQ format (q5k for 5 bits), other
            devices get a ggml format.
        columns: K of the weight. With a number of bits, a weight whose rows no K-quant divides gets the best other
            format of about this size, for example hqq4 instead of q4k. None: a multiple of 256, as most models have.

    Returns:
        The format. Its block divides `columns` if that of any format for the number does.

    Raises:
        ValueError: the name is unknown, or no format has this number of bits.

    Example:
        print(isqtorch.resolve_format(4).name, isqtorch.resolve_format(4, "mps").name)  # q4k afq4
        print(isqtorch.resolve_format(4, columns=576).name)
    """
    if isinstance(spec, bool) or not isinstance(spec, (int, str, QuantFormat)):
        raise ValueError(f"format must be a name or a number of bits, got {_shown(spec)}")
    bits = number_of_bits(spec)
    if bits is None:
        return get_format(spec)  # type: ignore[arg-type]  # it is no number
    table = _BY_BITS_MPS if torch.device(device).type == "mps" else _BY_BITS
    if bits not in table:
        raise ValueError(
            f"no format has {bits} bits. Use one of {', '.join(map(str, table))}, or a name: {', '.join(formats())}."
        )
    candidates = [get_format(name) for name in table[bits]]
    return next((fmt for fmt in candidates if columns is None or columns % fmt.block == 0), candidates[0])


def number_of_bits(spec: object) -> int | None:
    """Return the number of a specification that is a number of bits, also as text; None if it is anything else."""
    if isinstance(spec, str) and spec.isdecimal():
        return int(spec)
    return spec if isinstance(spec, int) and not isinstance(spec, bool) else None


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
