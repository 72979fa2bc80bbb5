"""What nvcc made of the kernels: registers, spills and stack from ptxas's log, instructions per weight from the machine code.

The inner loop of a product is the shortest loop that has nearly all matrix instructions. There are shorter ones for the rest of a
row, and a longer "loop" wherever the compiler has put something rare behind the end and jumps back from there.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L_x_\d+)\)")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
_MATRIX = "HMMA"
_NEARLY_ALL = 0.85  # the rest of a row takes a slice at a time, an eighth of a chunk


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one kind of GPU."""

    kernel: str  # mangled
    arch: str
    registers: int
    stack: int  # bytes per thread
    spilled: int  # bytes stored and loaded again because registers ran out


def read_log(text: str) -> list[Usage]:
    """The output of `ptxas -v`.

    Raises:
        ValueError: an entry without its numbers.
    """
    found = []
    for part in re.split(r"(?=ptxas info\s+: Compiling entry function)", text)[1:]:
        entry, memory, registers = _ENTRY.search(part), _MEMORY.search(part), _REGISTERS.search(part)
        if entry is None or memory is None or registers is None:
            raise ValueError(f"not as ptxas -v writes it: {part[:200]!r}")
        stack, stored, loaded = map(int, memory.groups())
        found.append(Usage(entry[1], entry[2], int(registers[1]), stack, stored + loaded))
    return found


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel.

    Attributes:
        kernel: mangled name.
        size: instructions in all.
        loop: opcodes of the inner loop with matrix instructions, as often as they stand there; empty if there is none.
    """

    kernel: str
    size: int
    loop: Counter[str]


def read_code(text: str) -> list[Code]:
    """The output of `nvdisasm -c` for a cubin."""
    found = []
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        labels: dict[str, int] = {}
        opcodes: list[str] = []
        branches: list[tuple[int, str]] = []
        for line in part.splitlines():
            label = _LABEL.match(line)
            if label:
                labels[label[1]] = len(opcodes)
            instruction = _INSTRUCTION.search(line)
            if instruction:
                words = _GUARD.sub("", instruction[1]).split()
                branch = _BRANCH.search(instruction[1])
                if branch:
                    branches.append((len(opcodes), branch[1]))
                opcodes.append(words[0].split(".")[0])
        loops = [opcodes[labels[to] : at + 1] for at, to in branches if labels.get(to, at + 1) <= at]
        most = max((loop.count(_MATRIX) for loop in loops), default=0)
        products = [loop for loop in loops if most and loop.count(_MATRIX) >= _NEARLY_ALL * most]
        found.append(Code(part.split(":", 1)[0], len(opcodes), Counter(min(products, key=len, default=[]))))
    return found


def disassemble(nvdisasm: str, cubin: Path) -> list[Code]:
    """All kernels of a cubin."""
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"nvdisasm: {cubin}: {done.stderr.strip()}")
    return read_code(done.stdout)


def demangle(names: Iterable[str]) -> dict[str, str]:
    """C++ names of mangled ones, without our namespaces and the parameters' types: "rows_kernel<Q4_0, f16, 2>"."""
    mangled = list(dict.fromkeys(names))
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return {name: _short(plain) for name, plain in zip(mangled, done.stdout.splitlines(), strict=True)}


_DTYPES = {"0": "f32", "1": "f16", "2": "bf16"}


def _short(name: str) -> str:
    name = re.sub(r"\(isqtorch::(\w+::)*Dtype\)(\d)", lambda match: _DTYPES[match[2]], name)
    name = re.sub(r"\(anonymous namespace\)::|isqtorch::|cuda::|gpu::", "", name).removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):  # up to the bracket that opens the parameters
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\((?:int|bool|\w+)\)(\w+)", r"\1", name)
