"""Puts the text of a Metal library together: a kernel file with what it includes, and the instances that are wanted.

`torch.mps.compile_shader` knows no include folders, so #include lines of our own headers are replaced by the files. `#line`
tells the compiler where each line comes from; its messages then name the file as it is in the repository.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(r'^#include "(metal/[\w/.]+)"$', re.MULTILINE)


@cache
def folder() -> Path:
    """Where metal/ lies: in the installed package, or in csrc/ of a checkout."""
    package = Path(__file__).resolve().parents[2]
    for found in (package / "csrc", package.parent / "csrc"):
        if (found / "metal" / "kernels").is_dir():
            return found
    raise ImportError(
        f"isqtorch: the Metal sources are neither in {package} nor beside it; the installation is incomplete"
    )


def assemble(kernel_file: str, header: str, instances: dict[str, str]) -> str:
    """The source of one library.

    Args:
        kernel_file: "metal/kernels/gemv.metal".
        header: what declares the format, "metal/formats/kquants.h".
        instances: kernel name for the host -> instance, {"gemv_1": "gemv<Q4K, half, 1>"}.
    """
    seen: set[str] = set()
    parts = [_inlined(header, seen), _inlined(kernel_file, seen), '#line 1 "instances"']
    return "\n".join([*parts, *(instance(*named) for named in instances.items()), ""])


def instance(name: str, template: str) -> str:
    """The line that makes a kernel of a template, in the form that MLX's kernels have, known to Apple's compiler."""
    return f'template [[host_name("{name}")]] [[kernel]] decltype({template}) {template};'


def _inlined(name: str, seen: set[str]) -> str:
    """The file with its own includes in place, each file once."""
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
