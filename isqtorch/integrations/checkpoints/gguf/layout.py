"""Where a parameter of a model is in a file, and what llama.cpp's converter does to its rows and values.

Rows of a packed matrix can be moved freely, because a block never spans two rows. Columns and values cannot: such a
tensor is decoded first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = Callable[[int], Tensor]
"""Number of rows -> for each row of the model, the number of the row in the file."""


@dataclass(frozen=True)
class Change:
    """A change of values or of dims of 1. Only float tensors, which are small here, are changed.

    Attributes:
        name: for messages.
        to_model: values of the file -> values of the model.
        to_file: the inverse.
    """

    name: str
    to_model: Callable[[Tensor], Tensor]
    to_file: Callable[[Tensor], Tensor]


ONE_ADDED = Change("1 is added", lambda stored: stored - 1, lambda value: value + 1)
MINUS_EXP = Change("-exp(x) is stored", lambda stored: torch.log(-stored), lambda value: -torch.exp(value))
SQUEEZED = Change(
    "the middle dim of 1 is dropped",
    lambda stored: stored.unsqueeze(1) if stored.dim() == 2 else stored,
    lambda value: value.squeeze(1),
)
COLUMN = Change("a last dim of 1 is added", lambda stored: stored.reshape(-1), lambda value: value.unsqueeze(-1))


@dataclass(frozen=True)
class Place:
    """Where one parameter of a model is in a file.

    The tensors are joined along their rows, in the order given. Then `rows` brings the rows, `columns` the columns into
    the order of the model, and `changes` are undone. The rows of a vector are its elements. The rows of a stack are the
    rows of each matrix; those of a stack of biases are the elements of each vector.

    Attributes:
        tensors: names in the file.
        rows: order of the rows; None: as in the model.
        columns: order of the columns; None: as in the model.
        changes: what was done to the values, first change first.
        part: the parameter is this entry of the first dimension of the tensor; None: all of it.
        is_bias: the rows are the last dimension, also of a stack.
        build: makes the parameter of the decoded tensors, where joining them is not enough.
    """

    tensors: tuple[str, ...]
    rows: Rows | None = None
    columns: Rows | None = None
    changes: tuple[Change, ...] = ()
    part: int | None = None
    is_bias: bool = False
    build: Callable[[list[Tensor]], Tensor] | None = None

    def row_axis(self, dims: int) -> int:
        """The dimension of the rows in tensors of so many dimensions."""
        return dims - 1 if self.is_bias or dims < 2 else dims - 2


def turned(split: tuple[int, ...], turn: tuple[int, ...], first: int = 0) -> Rows:
    """An order of rows that is a transposition.

    Args:
        split: dims into which the rows of the file are split; one is -1.
        turn: the order of these dims in the model.
        first: so many rows at the start stay where they are.
    """

    def rows(count: int) -> Tensor:
        moved = torch.arange(first, count).reshape(split).permute(turn).reshape(-1)
        return torch.cat([torch.arange(first), moved])

    return rows


def half_pairs(heads: int) -> Rows:
    """q and k of Llama: the file alternates the two halves of each head, which its rotary embedding pairs."""
    return turned((heads, -1, 2), (0, 2, 1))


def alternating() -> Rows:
    """Gate and up of gpt-oss: row by row in the model, one after the other in the file."""
    return turned((2, -1), (1, 0))


def by_head(heads: int) -> Rows:
    """q, k, v of Bloom: head by head in the model, all q, all k, all v in the file."""
    return turned((3, heads, -1), (1, 0, 2))


def by_group(heads: int, groups: int) -> Rows:
    """q, k, v of Falcon: group by group (its queries, its key, its value) in the model; all q, all k, all v in the file."""

    def rows(count: int) -> Tensor:
        size = count // (heads + 2 * groups)
        queries = torch.arange(heads * size).reshape(groups, -1)
        keys, values = torch.arange(heads * size, (heads + 2 * groups) * size).reshape(2, groups, size)
        return torch.cat([queries, keys, values], dim=1).reshape(-1)

    return rows


def back(rows: Tensor) -> Tensor:
    """For each row of the file, the number of the row in the model."""
    return torch.argsort(rows)


def of_blocks(columns: Tensor, block: int) -> Tensor | None:
    """An order of columns as an order of blocks of so many columns; None if it cuts a block."""
    if len(columns) % block:
        return None
    order = columns.view(-1, block)
    starts = order[:, :1]
    whole = bool((order == starts + torch.arange(block)).all()) and not bool((starts % block).any())
    return starts.flatten() // block if whole else None
