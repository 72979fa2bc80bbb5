"""Checks that are known to fail for a type, each with the reason. One that no longer fails is reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .checks import CHECKS, Row

# (type, check) -> why it fails, and why that is right or cannot be helped here
KNOWN: Mapping[tuple[str, str], str] = {
    ("superglue", "forward"): "the outputs are points and matches, which noise changes as a whole",
    (
        "fastspeech2_conformer",
        "forward",
    ): "the length of the sound is a sum of rounded durations, so one output may have a frame more",
    (
        "rwkv",
        "immediate",
    ): "the forward of RWKV divides weights in place, which packed ones refuse with an error that names "
    "the layer; exclude=['attention.output', 'feed_forward.value'] is the way out",
}


def unknown(rows: Iterable[Row], known: Mapping[tuple[str, str], str] = KNOWN) -> list[str]:
    """The failures that have no entry, as lines."""
    return [
        f"{row.kind}: {check}: {why}"
        for row in rows
        for check, why in row.failures.items()
        if (row.kind, check) not in known
    ]


def outdated(rows: Iterable[Row], known: Mapping[tuple[str, str], str] = KNOWN) -> list[str]:
    """The entries that are not needed: the check passes, or there is no such check. Only types of `rows` count."""
    found = {row.kind: row for row in rows}
    lines = []
    for (kind, check), why in known.items():
        if check not in (*CHECKS, "limits"):
            lines.append(f"{kind}: there is no check {check!r}; the checks are {', '.join(CHECKS)}, limits")
        elif kind in found and check not in found[kind].failures:
            state = f"is not built ({found[kind].not_built})" if found[kind].not_built else "no longer fails"
            lines.append(f"{kind}: {check} {state}: remove the entry ({why})")
    return lines
