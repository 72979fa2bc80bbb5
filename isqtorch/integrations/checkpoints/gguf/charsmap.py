"""The table by which sentencepiece normalizes text. The library that uses it trusts every index in it.

size u32 | nodes u32[size / 4] | texts, each with a zero byte at its end

The nodes are a trie in a "double array". At a node, `node ^ offset` is the base of its children: the child for byte c is
the node `base ^ c`, if that one has the label c. If the node has a leaf, it is at the base, and its value is the place
of a text.
"""

from __future__ import annotations

import numpy as np

_LEAF = 1 << 31  # set in a node that is a leaf, whose other bits are its value
_HAS_LEAF = 1 << 8
_BYTES = np.arange(1, 256, dtype=np.int64)  # a zero byte ends the search


def charsmap_fault(data: bytes) -> str | None:
    """What is wrong with a table; None: every text can be normalized with it.

    Args:
        data: the whole table.
    """
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 4 <= size <= len(data) - 4:
        return f"says that its nodes take {size} of its {len(data)} bytes"
    nodes = np.frombuffer(data, np.uint32, size // 4, 4).astype(np.int64)
    texts = data[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        return "has texts that are not UTF-8"
    seen = np.zeros(len(nodes), dtype=bool)
    here = np.zeros(1, dtype=np.int64)
    while len(here):
        seen[here] = True
        units = nodes[here]
        bases = here ^ ((units >> 10) << ((units & (1 << 9)) >> 6))
        if np.any((bases | 255) >= len(nodes)):
            return f"has a node whose children would lie behind the last of its {len(nodes)} nodes"
        values = nodes[bases[(units & _HAS_LEAF) != 0]] & (_LEAF - 1)
        if any(value >= len(texts) or texts[value] & 0xC0 == 0x80 for value in values.tolist()):
            return f"has a leaf that is no place in its {len(texts)} bytes of texts"
        following = []
        for some in np.array_split(bases, max(1, len(bases) >> 14)):  # not all at once: 256 children each
            children = some[:, None] ^ _BYTES
            following.append(children[(nodes[children] & (_LEAF | 255)) == _BYTES])
        here = np.unique(np.concatenate(following))
        here = here[~seen[here]]
    return None
