"""Without a compiled extension: a Mac and Windows install and compute without one, other systems say what is missing."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isqtorch.ops import uncompiled

ROOT = Path(__file__).resolve().parent.parent
ON_A_MAC = "import sys, torch, torch._dynamo; sys.platform = 'darwin'\n"

# Python on Windows, as far as it can be had elsewhere: what it lacks is gone, and what only it has is there.
ON_WINDOWS = r"""
import ctypes, os, sys, types
import torch, torch._dynamo, numpy, safetensors.torch, huggingface_hub, tqdm, tempfile, subprocess, multiprocessing, concurrent.futures

sys.platform = "win32"
for name in ("fcntl", "resource", "termios", "pwd", "grp", "readline", "pty"):
    sys.modules[name] = None
for name in "sysconf O_DIRECTORY O_CLOEXEC O_NONBLOCK fork getuid geteuid fchmod uname sched_getaffinity killpg setsid mkfifo".split():
    if hasattr(os, name):
        delattr(os, name)
locked = {}

def locking(descriptor, mode, size):
    key = os.fstat(descriptor).st_ino
    old = locked.get(key, descriptor)
    try:
        held = old != descriptor and os.fstat(old).st_ino == key
    except OSError:  # closed, which gives a lock back
        held = False
    if held:
        raise OSError("locked")
    locked[key] = descriptor

sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_LOCK=1, LK_NBLCK=2)
real_fsync, real_cdll = os.fsync, ctypes.CDLL

def fsync(descriptor):
    with open(f"/proc/self/fdinfo/{descriptor}") as file:
        flags = int(file.read().partition("flags:")[2].split()[0], 8)
    if flags & 3 == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    real_fsync(descriptor)

def cdll(name, *rest, **options):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    return real_cdll(name, *rest, **options)

os.fsync, ctypes.CDLL = fsync, cdll

class Kernel32:
    def GlobalMemoryStatusEx(self, status):
        found = status._obj
        assert found.length == 64 == ctypes.sizeof(found)
        found.total, found.free = 16 << 30, 5 << 30
        return 1

ctypes.windll = types.SimpleNamespace(kernel32=Kernel32())
"""

USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import isqtorch
print([str(w.message) for w in caught if "isqtorch" in str(w.message)])
import torch
from torch import nn
from isqtorch.ops import reference
assert isqtorch.ops.cpu_info().isa_selected == "none"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 32))
x = torch.randn(3, 256)
report = isqtorch.quantize_(model, "q4k", progress=False)
y = model(x)
w = reference.dequantize(model[0].weight, "q4k", torch.float32)
assert torch.equal(model[0](x), x @ w.t() + model[0].bias), "not the reference"
y.sum().backward()
print(report)
print(isqtorch.explain(model))
"""


def package_without_extension(folder: Path) -> Path:
    """The package as a wheel that was built without a compiler has it."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "isqtorch", folder / "isqtorch", ignore=ignore)
    shutil.copytree(ROOT / "csrc" / "metal", folder / "isqtorch" / "csrc" / "metal")
    shutil.copy(ROOT / "csrc" / "ops.cpp", folder / "isqtorch" / "csrc")
    return folder


def run(program: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


def test_a_mac_computes_without_the_extension(tmp_path: Path) -> None:
    done = run(ON_A_MAC + USE, package_without_extension(tmp_path))
    assert done.returncode == 0, done.stderr
    warned, *rest = done.stdout.splitlines()
    assert "without compiled CPU kernels" in warned and "xcode-select --install" in warned
    assert "there are no native kernels for cpu (the extension is not compiled)" in "\n".join(rest)


@pytest.mark.skipif(sys.platform != "linux", reason="takes away what Linux has")
def test_windows_computes_without_the_extension(tmp_path: Path) -> None:
    done = run(ON_WINDOWS + USE, package_without_extension(tmp_path))
    assert done.returncode == 0, done.stderr
    warned, *rest = done.stdout.splitlines()
    assert "without compiled CPU kernels" in warned and "WSL" in warned
    assert "there are no native kernels for cpu (the extension is not compiled)" in "\n".join(rest)


FILES = """
import pathlib
from torch import nn
from isqtorch.cli import build_parser
from isqtorch.files import system, writing
from isqtorch.report import fit
build_parser()
here = pathlib.Path("out")
here.mkdir()
model = nn.Sequential(nn.Linear(256, 64))
isqtorch.quantize_(model, "q4k", progress=False)
isqtorch.checkpoint.save(model, here / "model.safetensors")
isqtorch.checkpoint.save(model, here / "model.safetensors")  # replaces it
again = nn.Sequential(nn.Linear(256, 64))
isqtorch.checkpoint.load_(again, here / "model.safetensors")
assert torch.equal(model[0].weight.plain, again[0].weight.plain)
with writing.replacing_folder(here / "folder", lambda path: True) as folder:
    (folder / "a.txt").write_text("a", encoding="utf-8")
    held = folder.parent
    assert system.try_lock(str(held), wait=False) is None, "another process would remove it"
assert not held.exists() and (here / "folder/a.txt").read_text(encoding="utf-8") == "a"
assert sorted(path.name for path in here.iterdir()) == ["folder", "model.safetensors"]
left = here / ".folder.isqtorch-dead"
left.mkdir()
writing.recover(here / "folder")
assert not left.exists()
assert system.memory() == (16 << 30, 5 << 30) and system.peak_resident_bytes() is None and system.c_function("malloc_trim") is None
import socket
class Listener:
    def setsockopt(self, *option):
        self.option = option
socket.SO_EXCLUSIVEADDRUSE = ~socket.SO_REUSEADDR
listener = Listener()
system.claim_port(listener)
assert listener.option == (socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
fit._numbers = lambda path, scale=1: {}
assert fit.memories()[0].free == 5 << 30
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes away what Linux has")
def test_windows_reads_and_writes_files(tmp_path: Path) -> None:
    done = run(ON_WINDOWS + USE + FILES, package_without_extension(tmp_path))
    assert done.returncode == 0, done.stderr


_ONLY_POSIX = set(
    "sysconf O_DIRECTORY O_CLOEXEC O_NONBLOCK O_NOFOLLOW fork getuid geteuid getgid fchmod fchown chown uname getloadavg statvfs "
    "sched_getaffinity sched_setaffinity killpg getpgid setsid mkfifo nice wait waitpid posix_fadvise".split()
)
_POSIX_MODULES = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "readline", "syslog"}


def posix_only(path: Path) -> list[str]:
    """What a file uses that Windows lacks, outside of `try`, and text files that would be read in the encoding of a country."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = {
        id(node)
        for each in ast.walk(tree)
        if isinstance(each, ast.Try)
        for part in each.body
        for node in ast.walk(part)
    }
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import) and id(node) not in tried:
            found += [f"{line}: import {name.name}" for name in node.names if name.name in _POSIX_MODULES]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found += [f"{line}: os.{node.attr}"] if node.attr in _ONLY_POSIX else []
        elif isinstance(node, ast.Attribute) and node.attr in ("SO_REUSEADDR", "SO_REUSEPORT"):
            found.append(f"{line}: {node.attr} means something else")
        elif isinstance(node, ast.Call):
            named = {word.arg for word in node.keywords}
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            text = len(node.args) < {"read_text": 1, "write_text": 2}.get(name, 0)  # ours take a path, and are UTF-8
            if name == "open" and isinstance(node.func, ast.Name):
                mode = (
                    node.args[1]
                    if len(node.args) > 1
                    else next((w.value for w in node.keywords if w.arg == "mode"), None)
                )
                text = mode is None or (isinstance(mode, ast.Constant) and "b" not in str(mode.value))
            if text and "encoding" not in named:
                found.append(f"{line}: {name} without encoding")
    return found


def test_only_one_file_uses_what_windows_lacks(tmp_path: Path) -> None:
    faults = {}
    for path in (ROOT / "isqtorch").rglob("*.py"):
        if path.relative_to(ROOT / "isqtorch").as_posix() != "files/system.py" and (found := posix_only(path)):
            faults[path.name] = found
    assert not faults
    assert len(posix_only(ROOT / "isqtorch/files/system.py")) > 3  # the check sees them
    sample = tmp_path / "sample.py"
    sample.write_text(
        "import fcntl\nopen('x')\nopen('x', 'rb')\nos.fork()\ntry:\n    import readline\nexcept ImportError:\n    pass\n"
        "a.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
    )
    assert {line.partition(":")[0] for line in posix_only(sample)} == {"1", "2", "4", "9"}


@pytest.mark.parametrize("path", ["isqtorch", "csrc/metal"])
def test_names_of_files_are_possible_on_windows(path: str) -> None:
    """No reserved names and signs, and no two names that differ only in case."""
    names = [each.relative_to(ROOT).as_posix() for each in (ROOT / path).rglob("*") if "__pycache__" not in each.parts]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert not re.search(r'[<>:"|?*\\]', name) and len(name) < 150
        assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name.rpartition("/")[2].lower())


def test_other_systems_want_the_extension(tmp_path: Path) -> None:
    done = run("import torch; import isqtorch", package_without_extension(tmp_path))
    assert done.returncode and "ImportError: isqtorch is not compiled: there is no _C library" in done.stderr


def test_schemas_are_those_of_the_extension() -> None:
    of_python = {re.sub(r"\s", "", schema) for schema in uncompiled.schemas()}
    names = {schema.split("(")[0] for schema in uncompiled.schemas()}
    for name in names:
        schema = getattr(torch.ops.isqtorch, name).default._schema
        assert re.sub(r"\s", "", str(schema).removeprefix("isqtorch::")) in of_python
    assert {"quantize", "dequantize", "linear", "linear_frozen", "embedding", "experts_linear"} <= names


def setup(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py, after a few lines that change the machine it believes to be on."""
    script = f"import runpy, sys\n{program}\nsys.argv = ['setup.py', *{arguments!r}]\nrunpy.run_path('setup.py', run_name='__main__')"
    env = dict(os.environ) | environment
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "/bin/false"], ids=["missing", "broken"])
def test_a_mac_installs_without_a_compiler(tmp_path: Path, compiler: str) -> None:
    build = ["build", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = setup(ON_A_MAC, "--quiet", *build, CXX=compiler, CC=compiler)
    assert done.returncode == 0, done.stderr
    package = tmp_path / "lib" / "isqtorch"
    assert not list(package.glob("*.so"))
    sources = {path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc" / "metal").rglob("*") if path.is_file()}
    assert sources and sources <= {path.relative_to(package / "csrc") for path in (package / "csrc").rglob("*")}
    used = run(ON_A_MAC + USE, tmp_path / "lib")
    assert used.returncode == 0, used.stderr


def test_windows_installs_what_needs_no_compiler(tmp_path: Path) -> None:
    build = ["build", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = setup("import sys, torch, torch._dynamo; sys.platform = 'win32'", "--quiet", *build, CXX="no-such-compiler")
    assert done.returncode == 0 and "no compiled kernels on Windows yet" in done.stderr
    package = tmp_path / "lib" / "isqtorch"
    assert (package / "csrc/ops.cpp").is_file() and not list(package.glob("_C*"))


def test_other_systems_do_not(tmp_path: Path) -> None:
    done = setup("", "--quiet", "build", "--build-lib", str(tmp_path), CXX="no-such-compiler")
    assert done.returncode and "the C++ compiler no-such-compiler is not there" in done.stderr
