"""Without a compiled extension: a Mac installs and computes without one, other systems say what is missing."""

from __future__ import annotations

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


def test_other_systems_do_not(tmp_path: Path) -> None:
    done = setup("", "--quiet", "build", "--build-lib", str(tmp_path), CXX="no-such-compiler")
    assert done.returncode and "the C++ compiler no-such-compiler is not there" in done.stderr
