"""Tokens of preprocessed Metal source, with what lies between them, so that joined they are the source again."""

from __future__ import annotations

import re
from collections.abc import Iterator

PATTERN = re.compile(
    r"""(?P<marker>^\#[^\n]*)  # where the next line comes from
    |(?P<space>\s+)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<char>'(?:[^'\\\n]|\\.)*')
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<op>::|->|<<=|>>=|[-+*/%&|^!=<>]=|&&|\|\||<<|\+\+|--|[^\s\w])  # > and [ always alone
    """,
    re.MULTILINE | re.VERBOSE,
)
MARKER = re.compile(r'#\s*(?:line\s+)?(\d+) "(.*?)"')
OPEN, CLOSE = "([{", ")]}"


class Token(str):
    """Text with a kind: marker, space, string, char, number, name or op."""

    kind: str

    def __new__(cls, text: str, kind: str) -> Token:
        token = super().__new__(cls, text)
        token.kind = kind
        return token

    @property
    def counts(self) -> bool:
        """Whether the compiler sees it."""
        return self.kind not in ("marker", "space")


def tokenize(source: str) -> list[Token]:
    """All of a source; raises SyntaxError for what cannot be one."""
    tokens, at = [], 0
    while at < len(source):
        match = PATTERN.match(source, at)
        if not match:
            raise SyntaxError(f"not a token: {source[at : at + 40]!r}")
        tokens.append(Token(match.group(), str(match.lastgroup)))
        at = match.end()
    return tokens


def places(tokens: list[Token]) -> list[str]:
    """Where each token is: "file:line", by the markers."""
    found, file, line = [], "shader", 1
    for token in tokens:
        found.append(f"{file}:{line}")
        match = MARKER.match(token) if token.kind == "marker" else None
        if match:
            file, line = match[2], int(match[1]) - 1
        line += token.count("\n")
    return found


def following(tokens: list[Token], i: int) -> int:
    """The index of the next token that counts after i, or the length."""
    i += 1
    while i < len(tokens) and not tokens[i].counts:
        i += 1
    return i


def preceding(tokens: list[Token], i: int) -> int:
    """The index of the last token that counts before i, or -1."""
    i -= 1
    while i >= 0 and not tokens[i].counts:
        i -= 1
    return i


def closing(tokens: list[Token], i: int) -> int:
    """The index of the bracket that closes the one at i."""
    depth = 0
    for j in range(i, len(tokens)):
        if tokens[j].kind == "op":
            depth += (tokens[j] in OPEN) - (tokens[j] in CLOSE)
            if depth == 0:
                return j
    raise SyntaxError(f"{tokens[i]!r} is never closed")


def opening_angle(tokens: list[Token], i: int) -> int:
    """The index of the < that opens the template arguments that end at i."""
    depth = 0
    while i >= 0:
        if tokens[i] == ")":
            i = _opening(tokens, i)
        depth += (tokens[i] == ">") - (tokens[i] == "<")
        if depth == 0:
            return i
        i -= 1
    raise SyntaxError("'>' without '<'")


def closing_angle(tokens: list[Token], i: int) -> int:
    """The index of the > that closes template arguments, or -1 where the < at i is a comparison."""
    depth, j = 0, i
    while j < len(tokens) and tokens[j] not in (";", "{", "}", ")", "&&", "||"):
        if tokens[j] == "(":
            j = closing(tokens, j)
        depth += (tokens[j] == "<") - (tokens[j] == ">")
        if depth == 0:
            return j
        j += 1
    return -1


def _opening(tokens: list[Token], i: int) -> int:
    depth = 0
    for j in range(i, -1, -1):
        if tokens[j].kind == "op":
            depth += (tokens[j] in CLOSE) - (tokens[j] in OPEN)
            if depth == 0:
                return j
    raise SyntaxError(f"{tokens[i]!r} was never opened")


def split(tokens: list[Token]) -> Iterator[list[Token]]:
    """The parts between commas that are in no bracket, nor in template arguments."""
    part: list[Token] = []
    depth = angles = 0
    for token in tokens:
        if token.kind == "op":
            depth += (token in OPEN) - (token in CLOSE)
            angles = max(0, angles + (token == "<") - (token == ">"))
        if token == "," and depth == 0 and angles == 0:
            yield part
            part = []
        else:
            part.append(token)
    if any(token.counts for token in part):
        yield part


def text(tokens: list[Token]) -> str:
    """On one line, without markers."""
    return " ".join(token for token in tokens if token.counts)


def blank(tokens: list[Token]) -> Token:
    """As many line ends as the tokens have, and their markers."""
    kept = [t if t.kind == "marker" else "\n" * t.count("\n") for t in tokens if not t.counts]
    return Token("".join(kept), "space")


def attributes(tokens: list[Token]) -> dict[str, str]:
    """All [[name(arguments)]] of the tokens."""
    found = {}
    for i in range(len(tokens) - 1):
        if tokens[i] == "[" == tokens[i + 1]:
            for part in split(tokens[i + 2 : closing(tokens, i + 1)]):
                counted = [token for token in part if token.counts]
                found[str(counted[0])] = "".join(counted[2:-1])
    return found


def without_attributes(tokens: list[Token]) -> list[Token]:
    """The same without its [[...]]."""
    kept: list[Token] = []
    i = 0
    while i < len(tokens):
        if tokens[i] == "[" and i + 1 < len(tokens) and tokens[i + 1] == "[":
            i = closing(tokens, i)
        else:
            kept.append(tokens[i])
        i += 1
    return kept
