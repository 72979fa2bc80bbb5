"""Token windows: a calibration text, cut into sequences that begin as prompts do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.files.binary import read_text
from isqtorch.running import Ids, bos_token, context_length, token_ids

from .files import DEFAULT_CHUNK
from .self_written import SELF, describe, write_windows


@dataclass(frozen=True)
class Windows:
    """Sequences of tokens to calibrate with.

    Attributes:
        ids: int64 `[sequences, tokens]`.
        dataset: where they come from.
    """

    ids: Tensor
    dataset: str

    @property
    def facts(self) -> tuple[int, int, tuple[str, ...]]:
        """`chunk_count`, `chunk_size` and `datasets` of an importance matrix."""
        return (*self.ids.shape, (self.dataset,))


Text = Ids | os.PathLike[str] | Windows
"""A calibration text: "self", a file, a text, token ids `[T]`, or windows `[S, T]` that are read as they are."""


def token_windows(
    model: nn.Module,
    text: Text,
    tokenizer: Any,
    op: str,
    chunk: int = DEFAULT_CHUNK,
    max_tokens: int | None = None,
    least: int = 1,
    progress: bool | None = None,
) -> Windows:
    """Cut a text into windows, or let the model write them. An incomplete last window of a text is left out.

    Args:
        model: the model that will read them.
        text, tokenizer, chunk, max_tokens: see `collect_imatrix`.
        op: name of the calling function, for messages.
        least: cut a short text into at least this number of windows, which are then shorter than `chunk`.
        progress: whether to show a progress bar while the model writes.

    Raises:
        ValueError: a bad argument, or a text that is too short or not UTF-8.
        OSError: the file cannot be read.
    """
    for option, value in (("chunk", chunk), ("max_tokens", max_tokens)):
        if value is not None and (not isinstance(value, int) or value < 2):
            raise ValueError(f"{op}: {option} must be an integer of 2 or more, got {value!r}")
    if isinstance(text, Windows):
        return text
    if isinstance(text, Tensor) and text.ndim == 2 and len(text) > 1:
        return Windows(token_rows(text, op, max_tokens), "token ids")
    if is_self(text):
        written = write_windows(model, tokenizer, op=op, progress=progress)
        written = written if max_tokens is None else written[: max(1, max_tokens // written.shape[1])]
        return Windows(written, describe(written, tokenizer))
    content, dataset = read_calibration_text(text)
    ids = token_ids(content, tokenizer, op)[:max_tokens]
    if len(ids) < 2 * least:
        raise ValueError(f"{op}: {len(ids)} tokens are too few to calibrate with. Use a longer text.")
    longest = context_length(model)
    size = min(chunk, len(ids) // least, *([max(longest - 1, 1)] if longest is not None else []))
    chunks = ids[: len(ids) // size * size].view(-1, size).clone()  # [chunks, size]
    bos = bos_token(tokenizer)
    if bos is not None:
        chunks[:, 0] = bos
    return Windows(chunks, dataset)


def token_rows(ids: Tensor, op: str, max_tokens: int | None = None) -> Tensor:
    """Check windows of token ids `[S, T]` that are given as they should be read: int64 on the CPU."""
    rows = torch.stack([token_ids(row, None, op) for row in ids])
    if rows.shape[1] < 2:
        raise ValueError(f"{op}: windows of {rows.shape[1]} tokens are too short to calibrate with.")
    return rows if max_tokens is None else rows[: max(1, max_tokens // rows.shape[1])]


def check_text(op: str, text: Text | None, tokenizer: Any) -> None:
    """ValueError if a text file is given without a tokenizer."""
    if isinstance(text, os.PathLike) and tokenizer is None:
        raise ValueError(f"{op}: calibration_file needs tokenizer=..., the model's tokenizer")


def is_self(text: object) -> bool:
    """Whether the model itself is to write the text."""
    return isinstance(text, str) and text == SELF


def read_calibration_text(text: Ids | os.PathLike[str]) -> tuple[Ids, str]:
    """Return the text or ids (a file is read), and a name for them."""
    if isinstance(text, os.PathLike) or (isinstance(text, str) and len(text) < 4096 and _is_file(text)):
        return read_text(text), os.fspath(text)
    return text, "text" if isinstance(text, str) else "token ids"


def _is_file(text: str) -> bool:
    try:
        return os.path.exists(text) and not os.path.isdir(text)  # a pipe or a device is refused, and is no text
    except ValueError:  # a NUL character
        return False
