"""Imports go one way: formats -> quantizers -> ops -> modules -> policy, quantize, ... -> integrations -> cli."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "isqtorch"

# What may import what: a module imports its own layer and those above it in this list. A new module needs a line here.
LAYERS = [
    ["_version", "binary", "gguf_file", "gguf_names", "progress"],  # know nothing of quantization
    ["formats"],
    ["quantizers"],
    ["ops", "metal"],
    ["tensor"],
    ["modules"],
    [
        "inventory",
        "listeners",
        "weight_reads",
        "topology",
        "policy",
        "activations",
        "imatrix",
        "imatrix_files",
        "calibration",
        "routed",
        "prepare",
        "quantize",
        "origin",
        "source",
        "exchange",
        "requantize",
        "report",
        "plan",
        "fit",
        "explain",
        "tokens",
        "evaluation",
        "recipes",
        "mixed",
        "checkpoint",
    ],
    ["integrations"],
    ["cli"],
    ["__init__", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def component(path: Path) -> str:
    """The first part of a module's name below isqtorch: `ops/native.py` and `ops/__init__.py` are "ops"."""
    return path.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The components of isqtorch that a file imports, inside functions too."""
    package = ["isqtorch", *path.parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "isqtorch":
                found.add(name[1] if len(name) > 1 else "__init__")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    own = component(path)
    assert own in RANK, f"isqtorch/{path}: put {own!r} into LAYERS"
    for name in imported(path):
        if (
            name == "__init__" or name not in RANK
        ):  # `from isqtorch import x`: a public name, or a module without a layer
            name = name if name in RANK else "__init__"
        assert RANK[name] <= RANK[own], f"isqtorch/{path} imports {name!r}, which is a layer above it"


def test_nothing_imports_integrations() -> None:
    for path in SOURCES:
        if component(path) not in ("integrations", "cli", "__init__"):
            assert "integrations" not in imported(path), path


def test_the_check_sees_imports() -> None:
    assert {"cli", "_version"} & imported(Path("__main__.py"))
    assert "formats" in imported(Path("cli/formats.py"))


CSRC = ROOT / "csrc"
CXX = sorted(path for pattern in ("*.h", "*.inl", "*.cpp", "*.cu", "*.cuh", "*.metal") for path in CSRC.rglob(pattern))
every_source = pytest.mark.parametrize("path", CXX, ids=lambda path: str(path.relative_to(ROOT)))


def included(text: str) -> list[str]:
    return re.findall(r'#\s*include\s*[<"]([^>"]+)', text)


@every_source
def test_only_ops_files_know_torch(path: Path) -> None:
    """Kernels take raw pointers and sizes; tensors, checks and errors live in csrc/ops.cpp and csrc/<device>/ops_<device>.cpp."""
    if not path.name.startswith("ops"):
        names = included(path.read_text(encoding="utf-8"))
        assert not [name for name in names if re.match(r"torch/|ATen/|c10/", name)]


def foreign(file: str, text: str) -> list[str]:
    """What a file of csrc/ includes of a backend that is not its own; what all backends share includes none."""
    own = file.split("/")[0]
    return [name for name in included(text) if re.match(rf"(?!{own}/)(cpu|cuda|metal)/|\.", name)]


@every_source
def test_no_backend_includes_another(path: Path) -> None:
    assert not foreign(path.relative_to(CSRC).as_posix(), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "include"),
    [
        ("cpu/formats/fp8.h", "cuda/launch.h"),
        ("cuda/gpu.h", "cpu/lanes.h"),
        ("metal/formats/fp8.h", "cpu/lanes.h"),
        ("searches/twin.h", "cpu/lanes.h"),
        ("searches/twin.h", "cuda/kernels/quantize/lanes.cuh"),
        ("blocks.h", "cpu/lanes.h"),
        ("searches/twin.h", "../cpu/lanes.h"),
    ],
)
def test_the_check_sees_includes(file: str, include: str) -> None:
    text = (CSRC / file).read_text(encoding="utf-8")
    assert foreign(file, f'{text}\n#include "{include}"\n') == [include]
