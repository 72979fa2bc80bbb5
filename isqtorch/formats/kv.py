"""Formats for the keys and values of attention, and how a user may specify them."""

from __future__ import annotations

from .base import get_format

KV_FORMATS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""Blocks of 32 numbers, which fit the heads of most models. CPUs have kernels of their own for q8_0 and q4_0."""

KV_BLOCK = 32
_BY_BITS = {8: "q8_0", 5: "q5_1", 4: "q4_0"}


def kv_format(spec: int | str) -> str:
    """The name of a format for keys or values.

    Args:
        spec: a name, or a number of bits: 8, 5 or 4 (also as text, "8").

    Raises:
        ValueError: there is no such format, or keys and values cannot have it.
    """
    if isinstance(spec, str) and spec.strip().isdecimal():
        spec = int(spec)
    if isinstance(spec, int) and not isinstance(spec, bool) and spec in _BY_BITS:
        return _BY_BITS[spec]
    try:
        name = get_format(spec).name if isinstance(spec, str) else None
    except ValueError:
        name = None
    if name not in KV_FORMATS:
        raise ValueError(
            f"keys and values cannot be in {spec!r}. There are {', '.join(KV_FORMATS)}, and {', '.join(map(str, _BY_BITS))} bits."
        )
    return name


def kv_formats(spec: int | str, values: int | str | None = None) -> tuple[str, str]:
    """The formats of keys and of values.

    Args:
        spec: as for `kv_format`, or two with a slash between them: "q8_0/q4_0", keys first.
        values: the format of values; None: what `spec` says.

    Raises:
        ValueError: as `kv_format`, or `values` are given twice.
    """
    if isinstance(spec, str) and "/" in spec:
        keys, _, rest = spec.partition("/")
        if values is not None:
            raise ValueError(f"the format of values is given twice: {spec!r} and {values!r}")
        return kv_format(keys), kv_format(rest)
    keys = kv_format(spec)
    return keys, keys if values is None else kv_format(values)
