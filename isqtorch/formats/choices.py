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
        raise ValueError(f"format must be a name or a number of bits, got {spec!r:.200}")
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


register_mix(AUTO)
register_mix(KEEP)
