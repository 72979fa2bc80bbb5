"""Metal shaders: their text, completed to one source, and libraries compiled from it on first use.

The text lies in csrc/metal; torch.mps.compile_shader wants all of it in one string, so headers of ours are put in place of
their #include. One library holds few kernels (a format, a dtype), because all instantiations in a source are compiled at once:

    functions = shaders.library("kernels/gemv.metal", shaders.instance("gemv_q4_0_f16", "gemv<q4_0, half>"))
    functions.gemv_q4_0_f16(weight, x, y, n, k, threads=[groups * 64, rows, 1], group_size=[64, 1, 1])

Tests set `compile_source` to an emulator with the same interface, and call the same functions with CPU tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDERS = [
    Path(__file__).resolve().parent / "source",  # in an installed package
    Path(__file__).resolve().parents[2] / "csrc" / "metal",  # in a checkout
]
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"[^\n]*$', re.MULTILINE)
ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[^\n]*$", re.MULTILINE)


def _torch_compile(source: str) -> Any:
    return torch.mps.compile_shader(source)


compile_source: Callable[[str], Any] = _torch_compile
_libraries: dict[tuple[Callable[[str], Any], str, str], Any] = {}


def folder() -> Path:
    """Where the shaders are.

    Raises:
        FileNotFoundError: the installation has none.
    """
    for path in FOLDERS:
        if path.is_dir():
            return path
    raise FileNotFoundError(f"isqtorch: no Metal shaders in {' or '.join(map(str, FOLDERS))}; install isqtorch again")


def read(name: str) -> str:
    """A shader with the headers that it includes, each once, and with #line directives, so that errors name files.

    Args:
        name: A path below folder(), like those in #include "...".

    Raises:
        FileNotFoundError: it, or something that it includes, does not exist.
    """
    return _read(name, set())


def _read(name: str, done: set[str]) -> str:
    done.add(name)
    text = ONCE.sub("", (folder() / name).read_text(encoding="utf-8"))

    def included(match: re.Match[str]) -> str:
        if match[1] in done:
            return ""
        line = text.count("\n", 0, match.start()) + 2
        return f'{_read(match[1], done)}\n#line {line} "{name}"'

    return f'#line 1 "{name}"\n' + INCLUDE.sub(included, text)


def instance(host_name: str, function: str) -> str:
    """The line that makes a kernel of a template: `function` is `gemv<q4_0, half>`."""
    return f'template [[host_name("{host_name}")]] [[kernel]] decltype({function}) {function};\n'


def library(name: str, instances: str = "") -> Any:
    """The compiled shader `name` with these instances; its kernels are attributes.

    Raises:
        RuntimeError: Metal refuses the source; the message names it and says what the compiler says.
    """
    key = (compile_source, name, instances)
    if key not in _libraries:
        source = f'{read(name)}\n#line 1 "instances of {name}"\n{instances}'
        try:
            _libraries[key] = compile_source(source)
        except SyntaxError as error:
            raise RuntimeError(f"isqtorch: the Metal compiler refuses {name} with\n{instances}{error}") from error
    return _libraries[key]
