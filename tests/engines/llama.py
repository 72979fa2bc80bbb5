"""Ask llama.cpp about a file. It runs in another process, with the Python of the engines."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ASK = Path(__file__).resolve().parent / "ask_llama.py"
ENGINES = "ISQTORCH_ENGINES"
"""Environment variable: the Python that has llama-cpp-python. `make test-engines` sets it."""


@dataclass
class Answers:
    """What llama.cpp says of a file.

    Attributes:
        tokens: of the texts, without the special tokens that stand before and after every text.
        with_special: the same, with them.
        facts: metadata (as strings), "bos", "eos", "vocabulary".
        logits: f32 `[all tokens of ids, vocabulary]`.
    """

    tokens: list[list[int]]
    with_special: list[list[int]]
    facts: dict[str, Any]
    logits: Tensor


def ask(file: Path, texts: Sequence[str] = (), ids: Sequence[Sequence[int]] = ()) -> Answers:
    """What llama.cpp answers; an AssertionError with its last lines if it cannot load the file."""
    python = os.environ.get(ENGINES)
    assert python, f"{ENGINES} must be the path of a Python with llama-cpp-python: run `make test-engines`"
    with tempfile.TemporaryDirectory() as scratch:
        answers, logits = Path(scratch, "answers.json"), Path(scratch, "logits.npy")
        asked = {
            "file": str(file),
            "texts": list(texts),
            "ids": [list(each) for each in ids],
            "answers": str(answers),
            "logits": str(logits),
            "verbose": True,
        }
        questions = Path(scratch, "questions.json")
        questions.write_text(json.dumps(asked), encoding="utf-8")
        done = subprocess.run(
            [python, str(ASK), str(questions)], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"llama.cpp cannot use {file.name}:\n{done.stderr[-3000:]}"
        found = json.loads(answers.read_text(encoding="utf-8"))
        values = torch.from_numpy(np.load(logits)) if ids else torch.empty(0)
    return Answers(found.pop("tokens"), found.pop("with_special"), found, values)
