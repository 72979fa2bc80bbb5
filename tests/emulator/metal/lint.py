"""What Metal refuses and clang++ does not see: pointers without an address space, constants that are not `constant`, ...

A complaint is a line of text that begins with file and line. tests/emulator/README.md lists the rules.
"""

from __future__ import annotations

from collections.abc import Iterator

from .tokens import Token, closing, places, split, text, tokenize, without_attributes
from .translate import SPACES

FORBIDDEN = {
    "asm", "catch", "delete", "double", "dynamic_cast", "goto", "new", "std", "thread_local", "throw", "try", "typeid",
    "virtual",
}  # fmt: skip
ATTRIBUTES = {
    "function_constant": "torch cannot set function constants: use a template",
    "threadgroup": "torch cannot give threadgroup memory to a parameter: declare it in the kernel",
}
STATEMENTS = {"return", "case", "else", "delete", "goto", "using", "typedef", "template", "throw"}


def lint(source: str) -> list[str]:
    """Complaints about preprocessed source."""
    return [f"{place}: {what}" for place, what in _Lint(source).run()]


class _Lint:
    def __init__(self, source: str) -> None:
        tokens = tokenize(source)
        self.tokens = [token for token in tokens if token.counts]
        self.places = [place for token, place in zip(tokens, places(tokens), strict=True) if token.counts]
        self.statement = 0  # where the one that is looked at begins
        self.body_of: list[str] = []  # by open brace: kernel, function, type or block

    def run(self) -> Iterator[tuple[str, str]]:
        tokens = self.tokens
        for i, token in enumerate(tokens):
            place = self.places[i]
            if token in FORBIDDEN and token.kind == "name":
                yield place, f"'{token}' does not exist in Metal, or is not used here"
            for what in self.brackets(i):
                yield place, what
            if token in ("{", "}", ";"):
                head = tokens[self.statement : i]
                for what in self.declaration(without_attributes(head), token):
                    yield self.places[self.statement], what
                if token == "{":
                    self.body_of.append(self.kind_of_body(head))
                self.statement = i + 1
            if token == "}" and self.body_of:
                self.body_of.pop()

    def kind_of_body(self, head: list[Token]) -> str:
        if "kernel" in head:
            return "kernel"
        if any(word in head for word in ("struct", "class", "namespace", "union")) and "(" not in head:
            return "type"
        return "block" if self.inside("kernel", "function") else "function"

    def inside(self, *kinds: str) -> bool:
        return any(kind in self.body_of for kind in kinds)

    def brackets(self, i: int) -> Iterator[str]:
        """About token i, if it opens a bracket, or ends a type."""
        tokens = self.tokens
        if tokens[i] == "(" and tokens[i + 1] in ("*", "&") and tokens[i + 3 : i + 5] == [")", "["]:
            yield from self.array(i)
        if tokens[i] == "(":
            for part in split(tokens[i + 1 : closing(tokens, i)]):
                yield from self.parameter(without_attributes(part), i)
        if tokens[i] == "<" and i and tokens[i - 1].kind == "name":
            depth = 1
            for j in range(i + 1, min(i + 60, len(tokens))):
                depth += (tokens[j] == "<") - (tokens[j] == ">")
                if depth == 0:
                    for part in split(tokens[i + 1 : j]):
                        if part[-1] in ("*", "&"):
                            yield from _needs_space(part)
                    break
                if tokens[j] in (";", "{", "}", "(", "&&", "||"):
                    break
        if tokens[i] == "[" and tokens[i + 1] == "[":
            for name in (token for token in tokens[i + 2 : closing(tokens, i)] if token in ATTRIBUTES):
                yield ATTRIBUTES[name]
        elif tokens[i] == "[" and i and tokens[i - 1] in ("=", "(", ",", "return", "{"):
            yield "lambdas do not exist in Metal"

    def array(self, i: int) -> Iterator[str]:
        """About TYPE (&NAME)[SIZE], where the parenthesis before & is token i."""
        begin = next(j for j in range(i - 1, -1, -1) if self.tokens[j] in ("(", ",", ";", "{", "}"))
        if not SPACES.intersection(self.tokens[begin:i]):
            yield f"a pointer or reference without address space: {text(self.tokens[begin + 1 : i + 4])}"

    def parameter(self, part: list[Token], i: int) -> Iterator[str]:
        """About one of the parts in the parentheses that open at i: a parameter, a cast, or an expression."""
        before = _without_prefix(self.tokens[self.statement : i])
        # where x * y can only be a parameter: not in initializers
        head = not self.inside("kernel", "function") and not {"=", ":", "static_assert"} & set(before)
        parameter = head and before and before[-1].kind == "name" and _declares(part)
        cast = len(part) > 1 and part[-1] in ("*", "&") and _is_type(part[:-1])
        if parameter or cast:
            yield from _needs_space(part)

    def declaration(self, statement: list[Token], end: str) -> Iterator[str]:
        """About a statement, or the head of a body."""
        head = _without_prefix(statement)
        if head and head[0] in ("for", "if", "while") and "(" in head:
            head = head[head.index("(") + 1 :]
        if not head:
            return
        if _declares(head):
            yield from _needs_space(head)
        if head[0] in STATEMENTS:
            return
        in_function = self.inside("kernel", "function")
        is_variable = "(" not in head[: head.index("=")] if "=" in head else "(" not in head and end == ";"
        names_type = any(
            word in head for word in ("struct", "class", "enum", "namespace", "union", "operator", "friend")
        )
        if not names_type and is_variable and "constant" not in head:
            if "static" in head:
                yield f"a static variable must be constant: {text(head)}"
            elif not in_function and not self.inside("type") and len(head) > 1:
                yield f"a variable outside of functions must be constant: {text(head)}"
        if head[0] == "threadgroup" and is_variable and end == ";" and not {"*", "&"} & set(head):
            if in_function and "kernel" not in self.body_of:
                yield f"threadgroup variables are declared in kernels, not in functions: {text(head)}"


def _without_prefix(statement: list[Token]) -> list[Token]:
    """Without `public:` and `template <...>` at the beginning."""
    if len(statement) > 1 and statement[0] in ("public", "private", "protected") and statement[1] == ":":
        return _without_prefix(statement[2:])
    if statement and statement[0] == "template":
        depth = 0
        for j, token in enumerate(statement):
            depth += (token == "<") - (token == ">")
            if depth == 0 and j > 0:
                return _without_prefix(statement[j + 1 :])
        return []
    return statement


def _is_type(part: list[Token]) -> bool:
    """Whether tokens can name a type: names, ::, template arguments."""
    if not part or part[0].kind != "name" or part[-1] in ("::", "<", ","):
        return False
    depth = 0
    for i, token in enumerate(part):
        depth += (token == "<") - (token == ">")
        if depth == 0 and not (token.kind == "name" or token in ("::", ">", "*", "&")):
            return False
        if depth == 0 and i and token.kind == "name" and part[i - 1].kind == "name":
            if part[i - 1] not in SPACES | {
                "const",
                "volatile",
                "typename",
                "static",
                "constexpr",
                "inline",
                "unsigned",
            }:
                return token in SPACES | {"const", "volatile"}
    return depth == 0


def _declares(part: list[Token]) -> bool:
    """Whether tokens begin as the declaration of a pointer or reference: TYPE * NAME, then =, [, (, or the end."""
    depth = 0
    for i, token in enumerate(part):
        depth += (token == "<") - (token == ">")
        if depth == 0 and token in ("*", "&") and 0 < i < len(part) - 1:
            after = part[i + 1 :]
            while after and after[0] in ("*", "&", "const", "thread", "device", "constant", "threadgroup"):
                after = after[1:]
            named = bool(after) and after[0].kind == "name"
            return named and _is_type(part[:i]) and (len(after) == 1 or after[1] in ("=", "[", "(", ":", ","))
    return False


def _needs_space(part: list[Token]) -> Iterator[str]:
    """About a declaration or type: every * and & needs an address space of its own before it."""
    depth = begin = 0
    for i, token in enumerate(part):
        depth += (token == "<") - (token == ">")
        if depth == 0 and token in ("*", "&"):
            if token == "&" and begin:
                return  # a reference to a pointer: Apple's compiler takes it for one to `thread`
            if not SPACES.intersection(part[begin:i]):
                yield f"a pointer or reference without address space: {text(part[: i + 2])}"
                return
            begin = i + 1
        elif depth == 0 and token in ("=", "(", "[", ":", ","):
            return
