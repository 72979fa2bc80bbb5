"""The names that `import isqtorch` offers: to people, to `dir`, to `import *`, and to type checkers."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import isqtorch

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "examples" / "tour.py"


def run(program: str) -> str:
    """What a program prints that begins without transformers."""
    code = 'import sys; sys.modules["transformers"] = None\n' + program
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=True
    )
    return done.stdout.strip()


def test_only_public_names_are_listed() -> None:
    pytest.importorskip("transformers")
    assert dir(isqtorch) == sorted(isqtorch.__all__)
    assert {"IsqConfig", "Topology", "QuantExperts"} <= set(dir(isqtorch))
    for name in isqtorch.__all__:
        assert getattr(isqtorch, name) is not None
        assert not name.startswith("_") or name == "__version__"


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="module 'isqtorch' has no attribute 'quantise_'"):
        isqtorch.quantise_  # type: ignore[attr-defined]  # pyright: ignore


def test_without_transformers_the_name_is_absent_and_says_what_to_install() -> None:
    hint = "isqtorch.IsqConfig needs transformers: pip install 'isqtorch[hf]'"
    assert run("import isqtorch; print(hasattr(isqtorch, 'IsqConfig'), 'IsqConfig' in dir(isqtorch))") == "False False"
    assert run("import isqtorch\ntry: isqtorch.IsqConfig\nexcept AttributeError as error: print(error)") == hint
    assert run("try:\n    from isqtorch import IsqConfig\nexcept ImportError as error: print(error)") == hint
    assert run("from isqtorch import *; print('plan' in vars(), 'IsqConfig' in vars())") == "True False"


def test_the_class_is_not_behind_a_decorator_without_types() -> None:
    """Which would hide its parameters from editors."""
    tree = ast.parse((ROOT / "isqtorch/integrations/transformers/config.py").read_text(encoding="utf-8"))
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "IsqConfig")
    assert not cls.decorator_list


def test_the_tour_uses_every_public_name() -> None:
    used = set(re.findall(r"\bisqtorch\.(\w+)", TOUR.read_text(encoding="utf-8")))
    assert used == set(isqtorch.__all__)


def pyright(path: Path) -> str:
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False).stdout


def test_type_checkers_find_mistakes_in_a_users_program(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    lines = [
        "import isqtorch",
        "import torch",
        "model = torch.nn.Sequential()",
        "isqtorch.quantise_(model, 4)",
        'isqtorch.quantize_(model, 4, fallback="upp")',
        'isqtorch.requantize_(model, 4, organization="moe")',
        'isqtorch.plan(model, 4, activations="int8")',
        'isqtorch.perplexity(model, [1, 2], mode="mean")',
        'isqtorch.quantize(torch.ones(1, 256), "afq4", rule="mxl")',
        'isqtorch.IsqConfig("q4k", fallback="upp")',
        'isqtorch.IsqConfig("q4k", topology={"/lm_head/": "q6k"}, rule="search")  # nothing wrong',
        "isqtorch.quantize_(model, 4, spam=1)",
    ]
    (tmp_path / "program.py").write_text("\n".join(lines), encoding="utf-8")
    found = pyright(tmp_path / "program.py")
    assert sorted({int(line) for line in re.findall(r"program\.py:(\d+):\d+ - error", found)}) == [
        4,
        *range(5, 11),
        12,
    ], found
