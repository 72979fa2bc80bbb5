"""What `refine_` learns from: windows of a text, some of them held out, and the float model's predictions for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.importance.tokens import HOLD_EVERY
from isqtorch.importance.windows import Text, token_windows
from isqtorch.running import text_config

from .origin import Origin
from .targets import Targets, in_floats, predict
from .weights import STORED, Weights

OP = "refine_"
WAYS_OUT = "Give teacher=..., the float model, or the folder, .safetensors or .gguf file with its weights"
_CHUNK = 256  # tokens of a window
_HELD = 16  # windows that choose the step, at most
_MOST = 65536  # tokens whose predictions are kept


def lessons(
    model: nn.Module,
    teacher: nn.Module | str | os.PathLike[str] | None,
    text: Text | None,
    tokenizer: Any,
    steps: int,
    batch: int,
    progress: bool | None,
) -> tuple[Tensor, Tensor, Targets, Targets, tuple[str, ...]]:
    """Windows to learn from and held-out ones, the float model's predictions for both, and notes for the report."""
    if text is None:
        raise ValueError(
            f"{OP}: needs a text to learn from: text= a text, the path of a file or token ids; or text='self', and the model "
            "writes one."
        )
    if teacher is model:
        raise ValueError(f"{OP}: the teacher is the model itself. {WAYS_OUT}.")
    if isinstance(teacher, str) and teacher == STORED:
        raise ValueError(f"{OP}: teacher={STORED!r} is the model itself. {WAYS_OUT}.")
    weights = None
    if not isinstance(teacher, nn.Module):
        weights = Weights.find(model, teacher, Origin.of(model) or Origin(), OP, WAYS_OUT)
    written = token_windows(model, text, tokenizer, OP, chunk=_CHUNK, least=HOLD_EVERY, progress=progress)
    rows = written.ids
    if len(rows) < 2:
        raise ValueError(
            f"{OP}: one window is too few: some are held out. Give at least two windows, or a longer text."
        )
    _check_ids(model, rows)
    every = min(HOLD_EVERY, len(rows))
    is_held = torch.arange(len(rows)) % every == every - 1
    size = rows.shape[1]
    held = _spread(rows[is_held], _HELD)
    learn = _spread(rows[~is_held], max(1, min(steps * batch, _MOST // size - len(held))))
    both = torch.cat([learn, held])
    if weights is None:
        assert isinstance(teacher, nn.Module)
        targets = predict(teacher, both, batch, OP, progress)
    else:
        with in_floats(model, weights):
            targets = predict(model, both, 2 * batch, OP, progress)
    index = torch.arange(len(both))
    notes: tuple[str, ...] = ()
    if weights is not None and weights.source is not None:
        notes = (f"the float model has the weights in {weights.source.where}", *weights.alarms)
    return learn, held, targets.rows(index[: len(learn)]), targets.rows(index[len(learn) :]), notes


def _check_ids(model: nn.Module, rows: Tensor) -> None:
    """ValueError if the model does not know all ids."""
    known = getattr(text_config(model), "vocab_size", None)
    low, high = (int(value) for value in rows.aminmax())
    if low < 0 or (isinstance(known, int) and high >= known):
        most = known - 1 if isinstance(known, int) else "..."
        raise ValueError(
            f"{OP}: token ids run from {low} to {high}, the model knows 0 to {most}. Use the model's own tokenizer."
        )


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, spread evenly over them."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=torch.float64).round().long()]


def order(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Numbers of the windows of each step: all of them in a random order, then all in another."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < min(batch, count):
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch]
        waiting = waiting[batch:]
