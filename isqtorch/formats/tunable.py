"""The parts of a block that can change while the codes stay: scales and offsets that are real numbers."""

from __future__ import annotations

from .base import Part, QuantFormat


def untunable(fmt: QuantFormat) -> str | None:
    """Say why the scales of a format cannot change in small steps while the codes stay; None if they can."""
    if any(part.exponents for part in fmt.parts):
        return "its scales are powers of two"
    if _scales(fmt) != 1:
        return "it stores sums of its codes"
    return None


def tunable_parts(fmt: QuantFormat) -> tuple[Part, Part | None]:
    """The scale, and the offset if the format has one.

    Args:
        fmt: a format for which `untunable` returns None.
    """
    scale = next(part for part in fmt.parts if part.dtype.is_floating_point and part.name != fmt.offset)
    return scale, next((part for part in fmt.parts if part.name == fmt.offset), None)


def _scales(fmt: QuantFormat) -> int:
    """Number of real parts besides the offset. A second one is a sum, which depends on the scale."""
    return sum(part.dtype.is_floating_point for part in fmt.parts if part.name != fmt.offset)
