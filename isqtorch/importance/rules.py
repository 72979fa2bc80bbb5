"""Which rule packs a weight: the one that was asked for, where the format has it and it does no harm."""

from __future__ import annotations

from collections.abc import Sequence

from isqtorch.files.gguf_names import gguf_names
from isqtorch.formats import QuantFormat
from isqtorch.quantizers import has_rule

from .inputs import feeds_attention

SEARCH = "search"


def rule_of(
    names: Sequence[str], fmt: QuantFormat, asked: str | None, *, has_importance: bool, by_number: bool = False
) -> str | None:
    """Return the rule that packs a weight; "feedback" is for its callers.

    Args:
        names: the layers that share the weight.
        fmt: its format.
        asked: the rule of the request.
        has_importance: whether the importance of its columns is known.
        by_number: whether a number of bits was asked for. Then the best rule is meant, too: with importance it is
            "search" for formats whose default rule ignores importance.
    """
    if asked is None and by_number and has_importance and not fmt.takes_importance:
        asked = SEARCH
    if not has_rule(fmt, asked):
        return None
    return None if asked == SEARCH and not has_importance and is_delicate(names) else asked


def is_delicate(names: Sequence[str]) -> bool:
    """Whether "search" without importance may do harm to a weight: it is for queries, keys or values, or a down projection.

    The search clips the largest weights of a group, where that lowers the sum of all errors. Large language models have
    a few inputs that are a thousand times larger than the others: in front of the values of the first token, which
    cancel, and of one or two down projections, which write them. Only importance tells how much their weights matter.
    """
    return any(feeds_attention(name) or _writes_down(name) for name in names)


def _writes_down(name: str) -> bool:
    return any(".ffn_down" in known for known in gguf_names(name)[0])
