"""Assemble the source of a Metal library: a kernel file with its includes, and the wanted template instances.

`torch.mps.compile_shader` has no include folders, so the #include lines of our headers are replaced by the files.
`#line` directives make the compiler's messages name the files and lines of the repository.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(metal/[\w/.]+)"$', re.MULTILINE)


@cache
def folder() -> Path:
    """Return the csrc folder, in the installed package or in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for found in (package / "csrc", package.parent / "csrc"):
        if (found / "metal" / "kernels").is_dir():
            return found
    raise ImportError(
        f"isqtorch: the Metal sources are neither in {package} nor beside it; the installation is incomplete"
    )


def assemble(kernel_file: str, header: str, instances: dict[str, str]) -> str:
    """Return the source of one library.

    Args:
        kernel_file: such as "metal/kernels/gemv.metal".
        header: the file that declares the format, such as "metal/formats/kquants.h".
        instances: {kernel name for the host: instance}, such as {"gemv_1": "gemv<Q4K, half, 1>"}.
    """
    seen: set[str] = set()
    parts = [_inlined(header, seen), _inlined(kernel_file, seen), '#line 1 "instances"']
    return "\n".join([*parts, *(instance(*named) for named in instances.items()), ""])


def instance(name: str, template: str) -> str:
    """Return the line that instantiates a kernel template. MLX uses the same form, so Apple's compiler accepts it."""
    return f'template [[host_name("{name}")]] [[kernel]] decltype({template}) {template};'


def _inlined(name: str, seen: set[str]) -> str:
    """Return a file with its includes inserted; each file is included once."""
    if name in seen:
        return ""
    seen.add(name)
    text = (folder() / name).read_text(encoding="utf-8").replace("#pragma once\n", "\n")
    parts, line, end = [f'#line 1 "csrc/{name}"\n'], 1, 0
    for match in _INCLUDE.finditer(text):
        line += text.count("\n", end, match.end()) + 1
        parts += [text[end : match.start()], _inlined(match[1], seen), f'\n#line {line} "csrc/{name}"']
        end = match.end()
        line -= 1
    return "".join([*parts, text[end:]])
