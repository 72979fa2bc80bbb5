"""What the tests of integrations share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from hf import ...`

from hf import MODELS, load
from quiet import quiet as quiet  # a fixture

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of a model -> folder with its float checkpoint, written once and never to be written to."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            MODELS[name]().save_pretrained(folders[name])
        return folders[name]

    return folder


@pytest.fixture
def llama(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama")


@pytest.fixture
def packed(llama: Path, tmp_path: Path) -> Path:
    """The folder of a packed model."""
    from isqtorch import IsqConfig

    load(llama, quantization_config=IsqConfig("q4k")).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's adapters merge into packed layers, until the test ends."""
    from adapters import WRAPPED

    from isqtorch.integrations import peft

    for owner, names in WRAPPED.items():
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))  # restored afterwards
    peft.enable()
