"""What to take for the memory at hand: the most bits that fit, and what a smaller choice would give up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .fit import Memory, Overview, memories, overview
from .report import QuantReport

BITS = (8, 6, 5, 4, 3, 2)
"""The numbers of bits that have formats, the most first. The measured divergences have this order (docs/quality.md)."""

FAST = 4
"""Fewer bits than these cost more quality than they gain speed."""

_WORTH = {
    8: "the same answers as the original, nearly always",
    6: "hardly different from the original",
    5: "close to the original",
    4: "the usual choice: a quarter of the size, with a small loss",
    3: "a loss that one notices",
    2: "a large loss; a smaller model in 4 bits is often better",
}


@dataclass(frozen=True)
class Candidate:
    """A model in one number of bits.

    Attributes:
        bits: the number of bits; None: the weights as they are in the checkpoint.
        report: the predicted report; None for the weights as they are.
        nbytes: size of all weights.
        worth: what it is like, in a few words.
    """

    bits: int | None
    report: QuantReport | None
    nbytes: int
    worth: str

    @property
    def formats(self) -> str:
        """The formats that most of the weights get: "q4k"."""
        assert self.report is not None
        sizes: dict[str, int] = {}
        for layer in self.report.quantized:
            sizes[str(layer.stored)] = sizes.get(str(layer.stored), 0) + layer.bytes_after
        return max(sizes, key=lambda name: sizes[name], default="nothing packed")

    def to_dict(self) -> dict[str, Any]:
        """The candidate in plain types, for JSON."""
        bpw = None if self.report is None else round(self.report.bits_per_weight, 4)
        return {"bits": self.bits, "bytes": self.nbytes, "bits_per_weight": bpw, "worth": self.worth}


@dataclass(frozen=True)
class Recommendation:
    """What to take.

    Attributes:
        memory: where the model goes.
        room: bytes of it that the weights may take: what is free, less the cache and one weight that is being packed. Weights
            that stay as they are need no room for that.
        best: the best candidate that fits; None: none does.
        faster: a smaller one that is nearly as good and decodes faster; None: `best` is it, or is smaller.
        smallest: the smallest candidate, whether it fits or not.
        found: all that was predicted.
    """

    memory: Memory
    room: int
    best: Candidate | None
    faster: Candidate | None
    smallest: Candidate
    found: Overview

    def to_dict(self) -> dict[str, Any]:
        """The recommendation in plain types, for JSON."""
        return {
            "memory": asdict(self.memory),
            "context": self.found.context,
            "cache_bytes": self.found.cache_bytes,
            "largest_weight": self.found.largest,
            "room": self.room,
            "recommended": self.best and self.best.to_dict(),
            "faster": self.faster and self.faster.to_dict(),
            "smallest": self.smallest.to_dict(),
            "notes": self.found.notes,
        }


def recommend(
    source: str | os.PathLike[str],
    *,
    context: int = 4096,
    device: str | None = None,
    memory: int | None = None,
    **options: Any,
) -> Recommendation:
    """Choose a number of bits for a model and a memory. No weight is read.

    The best choice is the one with the most bits that fits. Packed weights of a checkpoint are best as they are: packing them
    anew with more bits does not bring back what they have lost.

    Args:
        source: a folder, a file or a model id, as for `plan`.
        context: length of the key-value cache in tokens, limited to the context of the model.
        device: "cpu", "cuda:1", "mps"; None: the GPU with the most free memory, the CPU if there is none.
        memory: bytes to fit into, instead of what is free there now.
        options: further arguments of `plan` (topology, organization, fallback).

    Raises:
        ValueError: this machine has no such device; and as `plan`.
        OSError: as `plan`.
    """
    place = _place(memories(), device)
    kind = "cpu" if place.name == "RAM" else place.name
    if memory is not None:
        place = Memory(place.name, memory, memory)
    found = overview(source, BITS, context=context, device=kind, **options)
    room = place.free - (found.cache_bytes or 0) - found.largest
    packed = [
        Candidate(bits, found.reports[str(bits)], found.reports[str(bits)].bytes_after, _WORTH[bits]) for bits in BITS
    ]
    as_it_is = [Candidate(None, None, found.bytes_now, "nothing is lost")] if found.is_packed else []
    candidates = [*as_it_is, *(each for each in packed if not as_it_is or each.nbytes < found.bytes_now)]
    best = next(
        (each for each in candidates if each.nbytes <= room + (found.largest if each.bits is None else 0)), None
    )
    return Recommendation(
        place, room, best, _faster(best, packed), min(candidates, key=lambda each: each.nbytes), found
    )


def _place(known: Sequence[Memory], device: str | None) -> Memory:
    """The memory of a device."""
    if device is None:
        return max(known[1:], key=lambda memory: memory.free, default=known[0])
    wanted = {"cpu": "RAM", "cuda": "cuda:0"}.get(device, device)
    for memory in known:
        if memory.name == wanted:
            return memory
    names = ", ".join({"RAM": "cpu"}.get(memory.name, memory.name) for memory in known)
    raise ValueError(f"plan: device must be one of this machine, {names}; got {device!r:.80}")


def _faster(best: Candidate | None, packed: Sequence[Candidate]) -> Candidate | None:
    """The candidate with `FAST` bits if it is clearly smaller than the best one: decoding reads every weight once per token."""
    fast = next(each for each in packed if each.bits == FAST)
    if best is None or best.bits is None or best.bits <= FAST or fast.nbytes > 0.9 * best.nbytes:
        return None
    return fast
