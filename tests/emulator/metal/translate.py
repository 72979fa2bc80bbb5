"""Metal to C++: what clang++ cannot read is rewritten, everything else stays where it was, line by line.

template [[host_name("x")]] [[kernel]] decltype(f<half>) f<half>;   removed, and noted as a kernel of the library
kernel void f(device half* x [[buffer(0)]], uint i [[...]])         noted: where parameters come from
threadgroup float tile[64];                                         EMULATOR_THREADGROUP(tile, float [64]);
float4(a, b), vec<T, 4>(x)                                          metal::make<float4>(a, b), ...
1.0, 1.0h                                                           1.0f, ((half)1.0f): MSL has no double
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .tokens import (
    Token,
    attributes,
    blank,
    closing,
    closing_angle,
    following,
    opening_angle,
    places,
    preceding,
    split,
    text,
    tokenize,
    without_attributes,
)

SPACES = {"device", "constant", "threadgroup", "thread"}
INPUTS = {
    "thread_position_in_grid": "kPositionInGrid",
    "thread_position_in_threadgroup": "kPositionInThreadgroup",
    "threadgroup_position_in_grid": "kThreadgroupPosition",
    "threads_per_threadgroup": "kThreadsPerThreadgroup",
    "dispatch_threads_per_threadgroup": "kDispatchThreadsPerThreadgroup",
    "threads_per_grid": "kThreadsPerGrid",
    "threadgroups_per_grid": "kThreadgroupsPerGrid",
    "thread_index_in_threadgroup": "kIndexInThreadgroup",
    "thread_index_in_simdgroup": "kIndexInSimdgroup",
    "simdgroup_index_in_threadgroup": "kSimdgroupIndex",
    "simdgroups_per_threadgroup": "kSimdgroups",
    "threads_per_simdgroup": "kSimdgroupSize",
    "thread_execution_width": "kSimdgroupSize",
    "thread_index_in_quadgroup": "kIndexInQuadgroup",
    "quadgroup_index_in_threadgroup": "kQuadgroupIndex",
    "quadgroups_per_threadgroup": "kQuadgroups",
}
VECTOR = re.compile(r"(bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float)[234]$")
FLOATING = re.compile(r"(\d[\d']*\.?[\d']*|\.\d[\d']*)([eE][+-]?\d+)?([hHfF]?)$")
MOST_THREADS = "1024"


@dataclass
class Function:
    """A kernel function, perhaps a template: where its parameters come from, as initializers of Parameter."""

    parameters: list[str]
    most_threads: str = MOST_THREADS


@dataclass
class Translation:
    """What one source becomes."""

    code: str
    functions: dict[str, Function] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)  # by host name: the function, `f<half>`

    def to_run(self) -> str:
        """C++ for the run pass: the code and a table of its kernels."""
        tables = [
            f"static const simt::metal::Parameter {name}_parameters[] = {{{', '.join([*function.parameters, '{}'])}}};"
            for name, function in self.functions.items()
            if any(_base(used) == name for used in self.kernels.values())
        ]
        rows = [
            f'    EMULATOR_KERNEL("{host}", {_base(used)}_parameters, {self.functions[_base(used)].most_threads}, ::{used}),'
            for host, used in self.kernels.items()
        ]
        return "\n".join(
            [
                '#include "metal/shim/shim.h"',
                self.code,
                '# 1 "table of kernels"',
                *tables,
                'extern "C" __attribute__((visibility("default")))',
                "const simt::metal::Kernel* metal_kernels(int* count) {",
                "  static const simt::metal::Kernel all[] = {",
                *rows,
                "    {}};",
                f"  *count = {len(rows)};",
                "  return all;",
                "}",
                "",
            ]
        )

    def to_check(self) -> str:
        """C++ for the check pass: the code, and everything instantiated."""
        uses = [f"auto* instance_{i} = &::{used};" for i, used in enumerate(self.kernels.values())]
        return "\n".join(['#include "metal/check.h"', self.code, '# 1 "instances"', *uses, ""])


def _base(used: str) -> str:
    return used.split(" ")[0]


def translate(source: str, only: str | None = None) -> Translation:
    """Translates preprocessed source.

    Args:
        source: What the preprocessor made of a shader, with its line markers.
        only: A regular expression; kernels whose host name does not contain it are left out.

    Raises:
        SyntaxError: for what is not understood; the message quotes it.
    """
    # Pragmas are about unrolling; the compiler need not obey.
    source = re.sub(r"^[ \t]*#[ \t]*pragma[^\n]*", "", source, flags=re.MULTILINE)
    source = re.sub(r'_Pragma\s*\(\s*"(?:[^"\\]|\\.)*"\s*\)', "", source)
    return _Translator(tokenize(source), re.compile(only or "")).run()


class _Translator:
    def __init__(self, tokens: list[Token], only: re.Pattern[str]) -> None:
        self.tokens = tokens
        self.only = only
        self.out: list[str] = []
        self.result = Translation("")
        self.last = Token(";", "op")  # the last token that counts
        self.depth = 0  # of braces

    def run(self) -> Translation:
        tokens, i = self.tokens, 0
        while i < len(tokens):
            try:
                i = self.step(i, tokens[i])
            except SyntaxError as error:
                raise SyntaxError(f"{places(tokens)[i]}: {error}") from None
            before = preceding(tokens, i)
            self.last = tokens[before] if before >= 0 else self.last
        self.result.code = "".join(self.out)
        return self.result

    def step(self, i: int, token: Token) -> int:
        """Writes what token i, and perhaps some after it, become; returns the index of the next one."""
        tokens = self.tokens
        after = following(tokens, i)
        next_token = tokens[after] if after < len(tokens) else Token("", "op")
        begins = self.last in (";", "{", "}")
        if token.kind == "op":
            self.depth += (token == "{") - (token == "}")
            if (
                token == "[" == next_token
                and after == i + 1
                and "kernel" in attributes(tokens[i : closing(tokens, i) + 1])
            ):
                self.note_kernel(i)
        elif token.kind == "number":
            self.out.append(_number(token))
            return i + 1
        elif token == "template" and next_token != "<" and begins:
            end = tokens.index(";", i)
            self.note_instance(tokens[i + 1 : end])
            self.out.append(blank(tokens[i : end + 1]))
            return end + 1
        elif token == "kernel":
            self.note_kernel(i)
        elif token == "threadgroup" and self.depth and begins:
            end = tokens.index(";", i)
            declared = _threadgroup_variable(tokens[i + 1 : end])
            if declared:
                self.out.append(declared + blank(tokens[i:end]))
                return end
        elif VECTOR.match(token) and next_token == "(" and self.last not in (".", "->"):
            self.out.append(f"metal::make<{token}>")
            return i + 1
        elif token == "vec" and next_token == "<":
            end = closing_angle(tokens, after)
            if end > 0 and tokens[following(tokens, end)] == "(":
                self.out.append(f"metal::make<{text(tokens[i : end + 1])}>")
                return end + 1
        self.out.append(token)
        return i + 1

    def note_kernel(self, i: int) -> None:
        """Notes the function whose head token i, `kernel` or [[kernel]], belongs to."""
        tokens = self.tokens
        begin = i
        while begin > 0 and tokens[begin - 1] not in (";", "{", "}"):
            begin -= 1
        at = i
        while tokens[at] != "(":
            at = closing(tokens, at) + 1 if tokens[at] == "[" else at + 1
        name = tokens[preceding(tokens, at)]
        end = closing(tokens, at)
        named = attributes(tokens[begin:at])
        parameters = list(_parameters(tokens[at + 1 : end]))
        self.result.functions[name] = Function(parameters, named.get("max_total_threads_per_threadgroup", MOST_THREADS))
        if "template" not in tokens[begin:i] and tokens[following(tokens, end)] == "{":
            self.add(named.get("host_name", name).strip('"'), name)

    def note_instance(self, tokens: list[Token]) -> None:
        """Notes `[[host_name("x")]] [[kernel]] TYPE f<ARGUMENTS>`, perhaps with a parameter list after it."""
        host = attributes(tokens).get("host_name")
        if host is None:
            return
        counted = [token for token in without_attributes(tokens) if token.counts]
        end = len(counted) - 1
        if counted[end] == ")":
            end = max(j for j, token in enumerate(counted) if token == "(" and closing(counted, j) == end) - 1
        if counted[end] != ">":
            raise SyntaxError(f"an instantiation without template arguments: {text(tokens)}")
        begin = opening_angle(counted, end) - 1
        self.add(host.replace('"', ""), text(counted[begin : end + 1]))

    def add(self, host: str, used: str) -> None:
        if not self.only.search(host):
            return
        if host in self.result.kernels:
            raise SyntaxError(f"two kernels are called {host!r}")
        self.result.kernels[host] = used


def _number(token: Token) -> str:
    """A floating literal as what it is in MSL: float, or half."""
    match = FLOATING.match(token)
    if not match or not ("." in match[1] or match[2] or match[3]):
        return token
    value = match[1] if "." in match[1] or match[2] else match[1] + "."
    number = f"{value}{match[2] or ''}f"
    return f"((half){number})" if match[3] in ("h", "H") else number


def _parameters(tokens: list[Token]) -> list[str]:
    found, next_buffer = [], 0
    for parameter in split(tokens):
        named = attributes(parameter)
        inputs = [INPUTS[name] for name in named if name in INPUTS]
        if inputs:
            found.append(f"{{simt::metal::Input::{inputs[0]}, 0, 0, false}}")
        elif "buffer" in named or SPACES.intersection(parameter):
            buffer = named.get("buffer", str(next_buffer))
            next_buffer = int(buffer) + 1
            found.append(f"{{simt::metal::Input::kBuffer, {buffer}, 0, false}}")
        else:
            raise SyntaxError(f"a kernel's parameter that is neither a buffer nor a known attribute: {text(parameter)}")
    return found


def _threadgroup_variable(tokens: list[Token]) -> str | None:
    """`float tile[64]` as its declaration in the shim; None for pointers and references."""
    counted = [token for token in without_attributes(tokens) if token.counts]
    end = counted.index("[") if "[" in counted else len(counted)
    if "*" in counted[:end] or "&" in counted[:end]:
        return None
    name = counted[end - 1]
    if len(list(split(counted))) > 1 or "=" in counted:
        raise SyntaxError(f"one threadgroup variable per declaration, without initializer: {text(tokens)}")
    return f"EMULATOR_THREADGROUP({name}, {text(counted[: end - 1])} {text(counted[end:])})"
