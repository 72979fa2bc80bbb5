"""Ask mlx-lm about a folder. It runs in another process, with the Python of the engines; MLX computes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import ENGINES
from torch import Tensor

ASK = Path(__file__).resolve().parent / "ask_mlx.py"


def ask_mlx(folder: Path, **asked: Any) -> dict[str, Tensor]:
    """What mlx-lm answers (see `ask_mlx.py`); an AssertionError with its last lines if it cannot load the folder."""
    python = os.environ.get(ENGINES)
    assert python, f"{ENGINES} must be the path of a Python with mlx-lm: run `make test-engines`"
    with tempfile.TemporaryDirectory() as scratch:
        answers, questions = Path(scratch, "answers.npz"), Path(scratch, "questions.json")
        questions.write_text(json.dumps({"folder": str(folder), "answers": str(answers), **asked}), encoding="utf-8")
        done = subprocess.run(
            [python, str(ASK), str(questions)], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"mlx-lm cannot use {folder.name}:\n{done.stderr[-3000:]}"
        with np.load(answers) as found:
            return {name: torch.from_numpy(found[name]) for name in found.files}
