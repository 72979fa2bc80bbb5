"""Install a wheel into a fresh environment outside of the clone, where no compiler is to be found, and use it there.

python release/trial.py                 in an environment that has the wheel already, as cibuildwheel makes one
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "psutil")
SAMPLE = ("test_formats.py", "test_tensor.py", "test_checkpoint.py", "test_goldens.py")
"""Tests of the files that are shipped: the registry, the kernels against outside arrays, saving."""
CHECKERS = ("mypy", "pyright[nodejs]")
PROGRAM = "examples/tour.py"
"""What a user's editor reads: a program that calls every public function."""

CHECK = """
import json, pathlib, subprocess, sys
import isqtorch
home = pathlib.Path(isqtorch.__file__).resolve()
assert pathlib.Path(sys.prefix).resolve() in home.parents, f"{home} is not the installed package"
from isqtorch.ops import cpu_info
print("isqtorch", isqtorch.__version__, "on", cpu_info().isa_selected, "of", *cpu_info().isa_supported)
"""


def trial(wheel: Path, torch: str, python: str = sys.executable) -> None:
    """Install and use a wheel.

    Args:
        wheel: the file.
        torch: what pip installs as torch.
        python: the interpreter to make the environment with.

    Raises:
        SystemExit: it could not be installed, or something failed that should work.
    """
    with tempfile.TemporaryDirectory(prefix="isqtorch-wheel-") as folder:
        place = Path(folder)
        _call([python, "-m", "venv", str(place / "env")], place)
        scripts = place / "env" / ("Scripts" if os.name == "nt" else "bin")
        own = scripts / ("python.exe" if os.name == "nt" else "python")
        version = subprocess.run(
            [str(own), "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True
        )
        extra = "[hf]" if version.stdout.strip() == "True" else ""  # transformers needs Python 3.11
        pip = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _call([*pip, torch, f"{wheel.resolve()}{extra}", *TOOLS, *(CHECKERS if extra else ())], place)
        use(own, place)
        if extra:  # the program imports transformers
            check_types(own, place)


def use(python: Path, place: Path) -> None:
    """Run what a new user runs, and a sample of the tests, with an installed package.

    Args:
        python: the interpreter of the environment.
        place: an empty folder outside of the clone, which has the demo model and the tests afterwards.
    """
    for name in ("tests", "examples"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", place)  # the markers of the tests
    # Only the environment's programs: a package that needs a compiler, or a clone, finds none.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    clean |= {"PATH": str(python.parent), "OMP_WAIT_POLICY": "passive"}
    run = [str(python)]
    _call([*run, "-c", CHECK], place, clean)
    _call([*run, "-m", "isqtorch", "doctor"], place, clean)
    if _has(python, "transformers"):
        _call([*run, "-m", "isqtorch", "demo", "--tokens", "1024", "--formats", "8", "4", "afq4", "fp8"], place, clean)
        folder = str(place / "packed")
        model = "examples/demo_model/model"
        _call([*run, "-m", "isqtorch", "quantize", "-m", model, "--isq", "4", "-o", folder], place, clean)
        _call(
            [*run, "-m", "isqtorch", "run", "-m", folder, "--prompt", "The function returns", "--max-new-tokens", "8"],
            place,
            clean,
        )
    tests = [f"tests/{name}" for name in SAMPLE]
    _call([*run, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "pythonpath=", *tests], place, clean)


def check_types(python: Path, place: Path) -> None:
    """Read a user's program against the installed package, as mypy and pyright do by default, mypy as strictly as it can.

    Args:
        python: the interpreter of an environment with `CHECKERS`.
        place: the folder that `use` has filled.

    Raises:
        SystemExit: a checker finds a fault, or does not find the types of the package.
    """
    run = [str(python), "-m"]
    # Without our own settings; transformers itself is not ours to check.
    settings = place / "mypy.ini"
    settings.write_text(
        "[mypy]\nstrict = True\n[mypy-transformers.*]\nfollow_imports = skip\nignore_missing_imports = True\n",
        encoding="utf-8",
    )
    _call([*run, "mypy", "--config-file", str(settings), PROGRAM], place)
    (place / "pyproject.toml").unlink()
    _call([*run, "pyright", "--pythonpath", str(python), PROGRAM], place)


def _has(python: Path, module: str) -> bool:
    return not subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, check=False).returncode


def _call(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    print("$", " ".join(command), flush=True)
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"isqtorch: failed with status {done.returncode}: {' '.join(command)}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="isqtorch-wheel-") as folder:
        use(Path(sys.executable), Path(folder))
