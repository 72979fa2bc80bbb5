"""The rooms of docs/architecture.md: imports go down the list of rooms, and no files import each other in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "isqtorch"
CSRC = ROOT / "csrc"

# From the ground up: a file imports files of its own room, and of rooms above it in this list. A new room needs a line here, and one
# in docs/architecture.md.
FLOORS = [
    ["_version", "files", "text", "progress", "running"],
    ["formats"],
    ["quantizers", "evaluation"],
    ["ops"],
    ["modules", "tensor"],
    ["policy", "explain"],
    ["report", "importance"],
    ["auto"],
    ["inplace"],
    ["checkpoint", "integrations"],
    ["app"],
    ["cli"],
    ["__init__", "__main__"],
]
RANK = {room: rank for rank, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("isqtorch", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
INSIDE = [path for path in SOURCES if path.parts[0] == "isqtorch"]


def module_name(path: Path) -> str:
    """`isqtorch/ops/native.py` is "isqtorch.ops.native", `isqtorch/ops/__init__.py` is "isqtorch.ops"."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in SOURCES}


def imports(path: Path, text: str | None = None) -> list[tuple[ast.stmt, str]]:
    """The modules of this repository that a file imports, also inside functions and for type checkers only."""
    text = (ROOT / path).read_text(encoding="utf-8") if text is None else text
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                found.append((node, f"{source}.{alias.name}" if f"{source}.{alias.name}" in FILES else source))
    # `from isqtorch import plan`, `formats`, ...: a public name that is called as a file is
    return [(node, name) for node, name in found if name in FILES]


def room(name: str) -> str:
    """The room of a module, or the file at the top."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Some files that import each other in a circle; empty if there are none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name not in done:
            for other in graph.get(name, ()):
                found = walk(other, [*way, name])
                if found:
                    return found
            done.add(name)
        return []

    return next(filter(None, (walk(name, []) for name in graph)), [])


@pytest.mark.parametrize("path", INSIDE, ids=str)
def test_imports_go_down(path: Path) -> None:
    own = room(module_name(path))
    assert own in RANK, f"{path}: put {own!r} into FLOORS"
    for node, name in imports(path):
        assert RANK[room(name)] <= RANK[own], f"{path}:{node.lineno} imports {name}, which is on a floor above"
        if RANK[room(name)] == RANK[own] and room(name) != own:
            assert FLOORS[RANK[own]].index(room(name)) < FLOORS[RANK[own]].index(own), f"{path}:{node.lineno}: {name}"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circle({module_name(path): [name for _, name in imports(path)] for path in SOURCES})


def test_a_planted_circle_is_found() -> None:
    graph = {module_name(path): [name for _, name in imports(path)] for path in SOURCES}
    graph["isqtorch.policy.topology"] += ["isqtorch.inplace.quantize"]
    assert {"isqtorch.policy.topology", "isqtorch.inplace.quantize"} <= set(circle(graph))


def test_the_check_sees_every_kind_of_import() -> None:
    planted = (
        "def f():\n    from ..inplace import pack\nimport isqtorch.cli.run\nfrom isqtorch.auto.budget import Budget"
    )
    found = {name for _, name in imports(Path("isqtorch/policy/topology.py"), planted)}
    assert found == {"isqtorch.inplace.pack", "isqtorch.cli.run", "isqtorch.auto.budget"}


@pytest.mark.parametrize("path", [path for path in INSIDE if len(path.parts) > 2], ids=str)
def test_names_of_a_room_are_relative_and_of_others_absolute(path: Path) -> None:
    own = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node, name in imports(path):
        if isinstance(node, ast.ImportFrom):
            inside = name == own or name.startswith(f"{own}.")
            assert (node.level > 0) == inside, f"{path}:{node.lineno} imports {name}"


@pytest.mark.parametrize("path", INSIDE, ids=str)
def test_only_integrations_and_the_program_know_transformers(path: Path) -> None:
    """Everything else works with any model; what it must know of transformers' classes, it knows by name."""
    if room(module_name(path)) in ("integrations", "app", "cli"):
        return
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert not [name for name in names if name.split(".")[0] in ("transformers", "vllm", "peft", "accelerate")]


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


PAGE = ROOT / "docs" / "architecture.md"


def test_the_page_about_the_architecture_lists_every_room() -> None:
    """In the order of FLOORS, so that the page and this test tell the same."""
    listed = re.findall(r"^\| `(isqtorch/[\w./]+|csrc/[\w./]+)` \|", PAGE.read_text(encoding="utf-8"), re.M)
    rooms = [name.removeprefix("isqtorch/").removesuffix(".py") for name in listed if name.startswith("isqtorch/")]
    assert rooms == [room for floor in FLOORS[:-1] for room in floor if room != "_version"]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert set(rooms) | {"__init__", "__main__", "_version"} == folders | files
    native = {name.removeprefix("csrc/") for name in listed if name.startswith("csrc/")}
    assert native >= {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name != "__pycache__"}
