"""What is declared is what is needed; metadata need no torch; the source distribution is whole; links work elsewhere."""

from __future__ import annotations

import ast
import json
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
from typing import Any

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


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content


def test_what_is_imported_is_declared() -> None:
    found = pyproject()["project"]
    extras = [entry for name, extra in found["optional-dependencies"].items() if name != "dev" for entry in extra]
    declared = {re.split(r"[^\w-]", entry)[0].lower() for entry in [*found["dependencies"], *extras]}
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
    for name in ("csrc", "isqtorch", "release"):
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
sys.path.insert(0, ".")
from release import backend
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


# ---- isolation -------------------------------------------------------------------------------------------------------

ASK = """
import importlib.util, json, sys
sys.path.insert(0, {root!r})
from release import backend
before = importlib.util.find_spec("torch") is not None
requires = [getattr(backend, f"get_requires_for_build_{{what}}")() for what in ("wheel", "editable")]
backend.show_torch()
print(json.dumps([before, *requires, importlib.util.find_spec("torch") is not None, sys.path[0]]))
"""


def environment(folder: Path, torch: str | None) -> Path:
    """A virtual environment with a torch that has nothing but a version, and its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    if torch:
        (packages / "torch").mkdir()
        (packages / "torch/__init__.py").touch()
        (packages / f"torch-{torch}.dist-info").mkdir()
        (packages / f"torch-{torch}.dist-info/METADATA").write_text(f"Name: torch\nVersion: {torch}\n")
    return python


def isolated(python: Path, folder: Path) -> list[object]:
    """What the backend says where an isolated build runs: pip removes what is installed from the path, and adds setuptools."""
    import setuptools

    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import site, sys\nsys.path[:] = [each for each in sys.path if each not in site.getsitepackages()]\n"
    )
    for name in ("setuptools", "_distutils_hack", "wheel"):
        if (package := Path(setuptools.__file__).parent.parent / name).is_dir():
            (folder / name).symlink_to(package)
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONNOUSERSITE": "1"}
    command = [str(python), "-c", ASK.format(root=str(ROOT))]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: list[object] = json.loads(done.stdout)
    return said


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled there, so no torch is needed")
@pytest.mark.parametrize(
    ("torch", "serves"), [(None, False), ("2.9.1", False), ("2.10.0+cpu", True), ("2.13.0", True), ("3.0", True)]
)
def test_isolation_uses_the_torch_that_is_installed(tmp_path: Path, torch: str | None, serves: bool) -> None:
    """Otherwise an installation from source downloads a second torch, on Linux with CUDA."""
    said = isolated(environment(tmp_path / "env", torch), tmp_path / "isolated")
    needed = ["ninja"] if serves else ["ninja", "torch>=2.10"]
    assert said == [False, needed, needed, serves, str(ROOT)]  # what was first on the path is first


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled there")
def test_ninja_is_found_beside_the_interpreter() -> None:
    """`make build` calls the interpreter of an environment that nobody has activated."""
    if not (Path(sys.executable).parent / "ninja").exists():
        pytest.skip("this environment has no ninja")
    script = f"""
import os, shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import setuptools
setuptools.setup = lambda **_: None
import setup
setup.build_cuda = lambda target: None
setup.Build.compile = lambda self: print(shutil.which("ninja"))
setup.Build(setuptools.Distribution()).run()
"""
    env = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(Path(sys.executable).parent / "ninja"), done.stderr


def test_windows_needs_no_torch_to_build() -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.platform = 'win32'; from release import backend; "
    script += "print(backend.get_requires_for_build_wheel())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_backend_asks_for_the_torch_that_the_package_declares() -> None:
    from release import backend as own

    declared = pyproject()
    assert f"torch>={'.'.join(map(str, own.OLDEST_TORCH))}" in declared["project"]["dependencies"]
    # What is listed here is installed for the source distribution and for the metadata, too.
    assert [re.split(r"[^\w-]", entry)[0] for entry in declared["build-system"]["requires"]] == ["setuptools"]


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
