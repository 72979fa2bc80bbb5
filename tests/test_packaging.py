"""What is declared is what is needed; metadata need no torch; the source distribution is whole; links work elsewhere."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"PIL": "pillow", "yaml": "pyyaml"}  # where a package is installed under another name
BROUGHT = {"starlette": "fastapi", "vllm": ""}  # by what; vllm imports the plug-in itself


def imported() -> Iterator[str]:
    """The first parts of what the package imports, anywhere."""
    for path in (ROOT / "isqtorch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def project() -> dict[str, object]:
    tomllib = pytest.importorskip("tomllib")
    with open(ROOT / "pyproject.toml", "rb") as file:
        content: dict[str, object] = tomllib.load(file)["project"]
    return content


def test_what_is_imported_is_declared() -> None:
    found = project()
    extras = [entry for name, extra in found["optional-dependencies"].items() if name != "dev" for entry in extra]  # type: ignore[attr-defined]
    declared = {re.split(r"[^\w-]", entry)[0].lower() for entry in [*found["dependencies"], *extras]}  # type: ignore[misc]
    needed = {NAMES.get(name, name) for name in imported()} - set(sys.stdlib_module_names) - {"isqtorch"}
    assert needed - set(BROUGHT) <= declared, sorted(needed - declared)
    assert {brought for name, brought in BROUGHT.items() if name in needed and brought} <= declared


_NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so", ".venv*", "build", "*.egg-info", ".git", ".*_cache")


def built(clone: Path) -> Path:
    """Add what a clone has in which the package was compiled."""
    (clone / "isqtorch/_C.abi3.so").write_bytes(b"compiled")
    (clone / "build/temp").mkdir(parents=True)
    (clone / "build/temp/ops.o").write_bytes(b"object")
    return clone


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A clone without what only the source distribution takes along."""
    target = tmp_path / "sources"
    for name in ("csrc", "isqtorch"):
        shutil.copytree(ROOT / name, target / name, ignore=_NOT_COPIED)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, target)
    return built(target)


def backend(sources: Path, call: str, **environment: str) -> None:
    """Call the build backend, as pip and build do, where torch cannot be imported."""
    code = f"""
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
import setuptools.build_meta as backend
backend.{call}
"""
    env = {**os.environ, "ISQTORCH_SOURCE_URL": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=sources, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def metadata(sources: Path, out: Path, **environment: str) -> Message:
    out.mkdir()
    backend(sources, f"prepare_metadata_for_build_wheel({str(out)!r})", **environment)
    (file,) = out.rglob("METADATA")
    return HeaderParser().parsestr(file.read_text(encoding="utf-8"))


def links(text: str) -> list[str]:
    """Targets of links that only work inside of the repository."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("https:", "#"))]


def test_metadata_without_torch(sources: Path, tmp_path: Path) -> None:
    found = metadata(sources, tmp_path / "out")
    assert found["Name"] == "isqtorch" and found["Author"] == "The isqtorch authors"
    assert {"pyyaml", "tqdm", "numpy"} <= set(found.get_all("Requires-Dist", []))
    assert found.get_all("Project-URL") is None  # nothing says where the repository is
    text = str(found.get_payload())
    assert "# isqtorch" in text and not links(text)


@pytest.mark.parametrize(
    "given",
    [
        "https://example.org/group/isqtorch",
        "https://example.org/group/isqtorch.git",
        "git@example.org:group/isqtorch.git",
    ],
)
def test_links_lead_to_the_repository(sources: Path, tmp_path: Path, given: str) -> None:
    found = metadata(sources, tmp_path / "out", ISQTORCH_SOURCE_URL=given)
    page = "https://example.org/group/isqtorch"
    assert f"Source, {page}" in found.get_all("Project-URL", []) and f"Issues, {page}/issues" in found.get_all(
        "Project-URL", []
    )
    text = str(found.get_payload())
    assert not links(text)
    inside = {link.partition("#")[0] for link in re.findall(rf"\]\({page}/(?:blob|raw)/main/([^)]+)\)", text)}
    assert "docs/guide.md" in inside and all((ROOT / path).exists() for path in inside)
    assert f"]({page}/raw/main/docs/quality.png)" in text  # images are shown, not pages about them


@pytest.mark.parametrize(
    "given", ["javascript:alert(1)", "https://x/) [evil](https://y", "file:///etc", "http://example.org/x/y"]
)
def test_what_is_no_page_is_not_taken(sources: Path, tmp_path: Path, given: str) -> None:
    assert metadata(sources, tmp_path / "out", ISQTORCH_SOURCE_URL=given).get_all("Project-URL") is None


def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "sources", ignore=_NOT_COPIED)
    sources = built(tmp_path / "sources")
    page = "https://example.org/group/isqtorch"
    backend(sources, f"build_sdist({str(tmp_path)!r})", ISQTORCH_SOURCE_URL=page)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    hidden = {name for name in listed if name.startswith(".")} - {".clang-format"}  # of the forge, not of the package
    assert set(filter(lambda name: (ROOT / name).is_file(), listed)) - hidden <= names
    assert {"tests/conftest.py", "examples/tour.py", "docs/guide.md", "csrc/ops.cpp", "Makefile"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    (again,) = (tmp_path / "unpacked").iterdir()  # a wheel that is built of it has the same pages
    assert f"Source, {page}" in metadata(again, tmp_path / "out").get_all("Project-URL", [])
