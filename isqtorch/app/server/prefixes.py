"""The beginnings of earlier prompts, whose keys and values are reused when a prompt begins in the same way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .kv import Prefix

_MOST = 64  # texts that are kept; each is compared with every new prompt


class Prefixes:
    """The latest prompts, up to a number of bytes.

    Only whole pieces are reused, in which prompts are read. So the numbers are those that reading would give, and a
    reply does not depend on what was asked before.

    Args:
        most_bytes: of all keys and values that are kept; 0: nothing is kept.
        piece: tokens of a piece.
    """

    def __init__(self, most_bytes: int, piece: int) -> None:
        self.most_bytes, self.piece = most_bytes, piece
        self._kept: list[tuple[npt.NDArray[np.int64], Prefix]] = []  # the latest used is the last

    def find(self, ids: list[int]) -> tuple[Prefix, int] | None:
        """What is known of the beginning of a text, and the number of its tokens. The last token is always read."""
        text = np.asarray(ids)
        found: tuple[int, int] | None = None
        for place, (known, _) in enumerate(self._kept):
            both = min(len(known), len(text) - 1)
            differs = np.flatnonzero(known[:both] != text[:both])
            same = (int(differs[0]) if len(differs) else both) // self.piece * self.piece
            if same and (found is None or same >= found[1]):
                found = place, same
        if found is None:
            return None
        entry = self._kept.pop(found[0])
        self._kept.append(entry)
        return entry[1], found[1]

    def missing(self, ids: list[int]) -> int:
        """Tokens at the beginning of a text that are worth keeping: 0 if they are kept already."""
        whole = len(ids) // self.piece * self.piece
        text = np.asarray(ids[:whole])
        known = any(len(kept) >= whole and (kept[:whole] == text).all() for kept, _ in self._kept)
        return 0 if known or not self.most_bytes else whole

    def add(self, ids: list[int], prefix: Prefix) -> None:
        """Keep the beginning of a text. Texts that it continues, and those unused for longest, make place."""
        if prefix.size > self.most_bytes:
            return
        text = np.asarray(ids)
        self._kept = [
            entry for entry in self._kept if len(entry[0]) > len(text) or (entry[0] != text[: len(entry[0])]).any()
        ]
        self._kept.append((text, prefix))
        while len(self._kept) > _MOST or sum(kept.size for _, kept in self._kept) > self.most_bytes:
            del self._kept[0]

    def clear(self) -> None:
        """Forget all: the weights have changed."""
        self._kept.clear()
