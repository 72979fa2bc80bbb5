"""`import isqtorch` is fast, quiet, opens no connection, compiles nothing and leaves heavy packages alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

HEAVY = ["transformers", "matplotlib", "huggingface_hub", "accelerate", "yaml", "tqdm"]

# Runs in a fresh interpreter. torch comes first: it is the yardstick, not ours to make faster.
SCRIPT = """
import gc, json, socket, subprocess, sys, time
began = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - began

def refuse(*args, **kwargs):
    raise AssertionError("import isqtorch must not do this")

class NoSocket(socket.socket):
    __init__ = refuse

socket.socket, socket.create_connection = NoSocket, refuse
subprocess.Popen.__init__ = refuse
before = set(sys.modules)
gc.collect()  # a collection of torch's objects takes longer than importing isqtorch, and may fall anywhere
began = time.perf_counter()
import isqtorch
seconds = time.perf_counter() - began
print(json.dumps({"share": seconds / torch_seconds, "modules": sorted({name.split(".")[0] for name in set(sys.modules) - before})}))
"""


def import_once() -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 1, f"import prints: {lines[:-1]}"
    return json.loads(lines[0])


def test_import_is_fast() -> None:
    """A small share of what importing torch takes (a second or two), so that the machine's speed does not matter."""
    # The first run may read cold files or compile bytecode: the best of three counts.
    assert min(import_once()["share"] for _ in range(3)) < 0.3


def test_import_leaves_heavy_packages_alone() -> None:
    assert not set(HEAVY) & set(import_once()["modules"])


def test_public_names_exist_and_are_not_modules() -> None:
    import types

    import isqtorch

    for name in isqtorch.__all__:
        value = getattr(isqtorch, name)
        assert name in ("checkpoint", "metal") or not isinstance(value, types.ModuleType), name


def test_a_function_keeps_its_name_when_its_module_is_imported_later() -> None:
    script = "import isqtorch, isqtorch.explain, isqtorch.formats, isqtorch.cli\n"
    script += "assert callable(isqtorch.explain) and callable(isqtorch.formats)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import PackageNotFoundError, version

    import isqtorch

    try:
        installed = version("isqtorch")
    except PackageNotFoundError:
        pytest.skip("isqtorch is not installed: these tests run from the source tree")
    assert installed == isqtorch.__version__


# ---- installed, and started inside a checkout ------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the compiled package; beside it, in "checkout", the same sources without the library."""
    package = ROOT / "isqtorch"
    shutil.copytree(package, tmp_path / "site" / "isqtorch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package, tmp_path / "checkout" / "isqtorch", ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    return tmp_path / "site"


def start(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    folder = installed.parent / "checkout"
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("arguments", [("-c", "import isqtorch"), ("-m", "isqtorch", "formats")], ids=["import", "-m"])
def test_sources_that_hide_the_installed_package_are_named(installed: Path, arguments: tuple[str, ...]) -> None:
    done = start(installed, *arguments)
    assert done.returncode == 1
    assert f"checkout/isqtorch are not compiled, and they hide the installed package in {installed}" in done.stderr
    assert "Start Python outside of the checkout" in done.stderr


def test_bench_measures_the_package_that_runs(installed: Path) -> None:
    """Its processes do not import what lies in the current directory."""
    pytest.importorskip("transformers")
    script = "import sys; from isqtorch.cli import main; sys.exit(main())"
    sizes = ["--prompt-len", "4", "--gen-len", "2", "--repeat", "1"]
    model = str(ROOT / "examples/demo_model/model")
    done = start(installed, "-P", "-c", script, "bench", "-m", model, "--isq", "q8_0", "--no-baseline", *sizes)
    assert done.returncode == 0 and "q8_0" in done.stdout, done.stderr
