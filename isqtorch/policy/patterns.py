"""Regexes from topology files, config.json and options, which must not hang: `re` can take exponential time.

`re` tries alternatives one after another and cannot be interrupted. So its work is bounded before it starts. The bound
is the number of ways in which it can walk through the regex on a path of n characters, from every start:

    a character or class           1 way
    a sequence                     the ways of its parts, multiplied
    alternatives                   the ways of each, added; texts of equal length exclude each other
    x* x+ x{2,} x{1,9}             n + 1 ways, if x itself has one way and is not empty: how often it repeats.
                                   1 way, if a character that x cannot contain ends it: \\d+\\.
    x* where x has several ways    refused: nested repetitions multiply with each other
    no ^ in front                  n + 1 starts

k factors of n + 1 need no more than C(n + k, k) ways, because their places are in order. A regex is refused if a path
of 128 characters has more than a million ways, and on a longer path it is refused when it comes. A million ways take
about 20 ms; `Patience` bounds the sum over all regexes and paths of a request.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    from re import _compiler as compiler  # type: ignore[attr-defined]  # private, but no other module parses regexes
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:  # the same modules under their older names
    import sre_compile as compiler
    import sre_constants as ops
    import sre_parse as parser

MAX_REGEX = 1 << 16  # characters
SECONDS = 30.0  # for all regexes of a request together; ordinary ones take milliseconds

_LENGTH = 128  # characters of a path; few models have longer ones
_MOST_WAYS = 1e6
_MOST_FOLDED = 1 << 10  # characters in a range that ignores case: `re` compiles them one by one
_FOLDS = int(re.IGNORECASE)  # an operation on the enum itself takes long
_CHARACTERS = {ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.AT}  # and places between them: one way each


class Patience:
    """The time that the regexes of one request may take together."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin the next request."""
        self.left = SECONDS


@dataclass(frozen=True)
class PathRegex:
    """A regex that is searched in paths of layers, with a bound on its work.

    Attributes:
        text: the regex.
        what: its name in messages, such as "topology: entry '/lm_head/'".
    """

    text: str
    what: str = field(compare=False)
    patience: Patience = field(compare=False, default_factory=Patience)
    _compiled: re.Pattern[str] = field(init=False, compare=False, repr=False)
    _ways: _Ways = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Parse the regex.

        Raises:
            ValueError: it is not a regex, or it could take too long.
        """
        if not isinstance(self.text, str):
            raise ValueError(f"{self.what} is not a regex: it is a {type(self.text).__name__}, not text")
        if len(self.text) > MAX_REGEX:
            raise ValueError(f"{self.what} has {len(self.text)} characters, the limit is {MAX_REGEX}")
        try:
            tree = parser.parse(self.text)
            ways = _search_ways(tree)
            compiled = compiler.compile(tree)  # `re.compile` would parse again, which takes longer than the rest
        except _TooManyWaysError as error:
            raise ValueError(f"{self.what}: this regex could take too long: {error}") from None
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(f"{self.what}: bad regex: {reason}") from None
        object.__setattr__(self, "_compiled", compiled)
        object.__setattr__(self, "_ways", ways)
        if ways.on(_LENGTH) > _MOST_WAYS:
            raise ValueError(
                f"{self.what}: this regex could take too long: it has too many repetitions (* + {{}}) or alternatives that match "
                "the same text. Begin it with ^, or write [^.]* for one part of a path in the place of .*"
            )

    def search(self, path: str) -> bool:
        """Whether the regex matches anywhere in the path.

        Raises:
            ValueError: the path is too long for this regex, or the time of the request is used up.
        """
        if len(path) > _LENGTH and self._ways.on(len(path)) > _MOST_WAYS:
            raise ValueError(
                f"{self.what}: this regex could take too long on a path of {len(path)} characters: {path:.200}. Give it fewer * and +."
            )
        began = time.perf_counter()
        found = self._compiled.search(path) is not None
        self.patience.left -= time.perf_counter() - began
        if self.patience.left < 0:
            raise ValueError(
                f"{self.what}: the regexes took more than {SECONDS:.0f} s together. Give fewer or simpler ones."
            )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the compiled regex, which does not know its text."""
        return PathRegex, (self.text, self.what, self.patience)


class _TooManyWaysError(ValueError):
    pass


class _Ways(NamedTuple):
    """A bound on the ways through a part of a regex: `fixed` times C(n + free, free) on a path of n characters."""

    fixed: float = 1
    free: int = 0

    def on(self, length: int) -> float:
        return self.fixed * math.comb(length + self.free, self.free) if self.free < 16 else math.inf

    def __mul__(self, other: _Ways) -> _Ways:  # type: ignore[override]  # a tuple's own product is no use here
        return _Ways(min(self.fixed * other.fixed, 1e300), self.free + other.free)


_ONE = _Ways()


def _search_ways(tree: Any) -> _Ways:
    """The ways of a search. The last item, if it can match nothing, ends the search and is never tried again."""
    items = list(tree.data)
    ignores_case = bool(tree.state.flags & re.IGNORECASE)
    if items and items[-1][0] in (ops.MAX_REPEAT, ops.MIN_REPEAT) and items[-1][1][0] == 0:
        _ways_of_item(items[-1], None, ignores_case)  # only for what it refuses
        items.pop()
    anchored = bool(items) and items[0][0] is ops.AT and items[0][1] in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING)
    anchored = anchored and not tree.state.flags & re.MULTILINE
    return _ways_of(items, None, ignores_case) * _Ways(1, 0 if anchored else 1)


def _ways_of(items: list[Any], follower: Any, ignores_case: bool) -> _Ways:
    """The ways of a sequence, the `data` of a parsed part. `follower` is the item after it, None if that is not known."""
    ways = _ONE
    for i, item in enumerate(items):
        if item[0] not in _CHARACTERS:  # most items are
            after = items[i + 1] if i + 1 < len(items) else follower
            factor = _ways_of_item(item, after, ignores_case)
            if factor is not _ONE:
                ways = factor if ways is _ONE else ways * factor
    return ways


def _ways_of_item(item: Any, follower: Any, ignores_case: bool) -> _Ways:
    op, value = item
    if op is ops.SUBPATTERN:
        _, added, removed, inner = value
        return _ways_of(inner.data, follower, (ignores_case or bool(added & _FOLDS)) and not removed & _FOLDS)
    if op is ops.BRANCH:
        return _ways_of_branches(value[1], follower, ignores_case)
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        return _ways_of(value[1].data, None, ignores_case)
    if op is ops.GROUPREF_EXISTS:
        return _ways_of_branches([part for part in value[1:] if part is not None], follower, ignores_case)
    if op in _REPEATS:
        least, most, inner = value
        return _ways_of_repeat(least, most, inner, follower, ignores_case)
    if op is _ATOMIC:
        return _ways_of(value.data, None, ignores_case)
    if op is ops.IN and ignores_case:
        for kind, characters in value:
            if kind is ops.RANGE and characters[1] - characters[0] > _MOST_FOLDED:
                raise _TooManyWaysError("a class that ignores case has a range of thousands of characters")
    return _ONE


def _ways_of_branches(branches: Sequence[Any], follower: Any, ignores_case: bool) -> _Ways:
    """The ways of alternatives. Of plain texts, only those that continue each other can match at one place."""
    texts = [tuple(branch.data) for branch in branches]
    if all(op is ops.LITERAL for text in texts for op, _ in text) and len(set(texts)) == len(texts):
        lengths = len({len(text) for text in texts})
        return _ONE if lengths == 1 else _Ways(lengths)
    each = [_ways_of(branch.data, follower, ignores_case) for branch in branches]
    return _Ways(sum(ways.fixed for ways in each), max((ways.free for ways in each), default=0))


def _ways_of_repeat(least: int, most: int, inner: Any, follower: Any, ignores_case: bool) -> _Ways:
    once = _ways_of(inner.data, None, ignores_case)
    shortest = inner.getwidth()[0]
    if most <= 1:
        return _Ways(once.fixed + (least == 0), once.free)
    if once != _ONE or shortest == 0:
        if most <= 8:
            return math.prod([_Ways(once.fixed + 1, once.free)] * most, start=_ONE)
        raise _TooManyWaysError("a repetition (* + {}) is repeated itself, or repeats nothing")
    if least == most or _is_ended(inner, follower, ignores_case):
        return _ONE
    return _Ways(1, 1)


def _is_ended(inner: Any, follower: Any, ignores_case: bool) -> bool:
    """Whether a repetition of one character must end where it does, because the text that follows is not in it."""
    if follower is None or follower[0] is not ops.LITERAL or len(inner) != 1:
        return False
    character = chr(follower[1])
    return not (ignores_case and character.isalpha()) and not _can_match(inner[0], character)


def _can_match(item: Any, character: str) -> bool:
    """Whether an item of a regex can match a character; True if that is not known."""
    op, value = item
    if op is ops.LITERAL:
        return bool(value == ord(character))
    if op is ops.NOT_LITERAL:
        return bool(value != ord(character))
    if op is ops.SUBPATTERN and len(value[3]) == 1:
        return _can_match(value[3][0], character)
    if op is not ops.IN:
        return True
    negated = value[0][0] is ops.NEGATE
    found = False
    for kind, part in value[1:] if negated else value:
        if kind is ops.LITERAL:
            found |= part == ord(character)
        elif kind is ops.RANGE:
            found |= part[0] <= ord(character) <= part[1]
        elif kind is ops.CATEGORY and part in _CATEGORIES:
            found |= re.match(_CATEGORIES[part], character) is not None
        else:
            return True
    return found != negated


_CATEGORIES = {
    ops.CATEGORY_DIGIT: r"\d",
    ops.CATEGORY_NOT_DIGIT: r"\D",
    ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S",
    ops.CATEGORY_WORD: r"\w",
    ops.CATEGORY_NOT_WORD: r"\W",
}
_ATOMIC = getattr(ops, "ATOMIC_GROUP", None)  # Python 3.11 has these two
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT, getattr(ops, "POSSESSIVE_REPEAT", None))
