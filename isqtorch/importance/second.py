"""Sums of x x' over the rows x that a layer reads, and a sample of rows that are not in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

HELD_ROWS = 1024
"""Most held-out rows of an input; twice as many are thinned out to this number."""

_LOPSIDED = 1e-3  # of the largest square: most difference of two elements that should be equal
_COMPARED = 1024  # rows at a time
_FOLD = 256  # rows that are added to the sum at once: a product of few rows would be slow


@dataclass
class Second:
    """The sum of x x' over rows x, or only its diagonal.

    As long as there are fewer rows than columns, the rows themselves take less memory than their sum. An input that may
    see few rows (of an expert, or the first tokens of windows) keeps them until then.

    Attributes:
        columns: K.
        full: whether the whole sum is wanted, and not only its diagonal.
        sparse: whether there may be fewer rows than columns.
        count: number of rows.
        squares: the diagonal, f32 `[K]`.
        total: the sum, f32 `[K, K]`; None: there is none yet, and `rows` has everything.
        rows: rows that are not in `total`, f32 `[R, K]` each.
    """

    columns: int
    full: bool = True
    sparse: bool = False
    count: int = 0
    squares: Tensor | None = None
    total: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Add rows `[S, K]` of any float type."""
        if not len(x):
            return
        x = x.detach()
        self.count += len(x)
        squares = torch.ops.isqtorch.square_sums(x)[0]
        self.squares = squares.clone() if self.squares is None else self.squares.add_(squares.to(self.squares.device))
        if not self.full:
            return
        if self.total is not None:
            x = x.to(self.total.device)
        if len(x) >= _FOLD and not self.sparse:
            self._fold([x.float()])
            return
        self.rows.append(x.to(torch.float32, copy=True))
        waiting = sum(map(len, self.rows))
        if waiting >= (self.columns if self.sparse and self.total is None else _FOLD):
            self.fold()

    def fold(self) -> None:
        """Add the waiting rows to the sum."""
        rows, self.rows = self.rows, []
        self._fold(rows)

    def finish(self) -> None:
        """Bring the sum up to date, where there is one, or where it takes less memory than the rows."""
        if self.rows and (self.total is not None or not self.sparse):
            self.fold()
        elif len(self.rows) > 1:
            self.rows = [torch.cat(self.rows)]

    def matrix(self) -> Tensor:
        """The sum, f32 `[K, K]`: zeros if there is no row."""
        if self.total is not None and not self.rows:
            return self.total
        device = self.rows[0].device if self.rows else torch.device("cpu")
        out = (
            torch.zeros(self.columns, self.columns, dtype=torch.float32, device=device)
            if self.total is None
            else self.total.clone()
        )
        for rows in self.rows:
            out.addmm_(rows.t(), rows)
        return out

    def diagonal(self) -> Tensor:
        """The sums of squares, f32 `[K]`."""
        return torch.zeros(self.columns, dtype=torch.float32) if self.squares is None else self.squares

    def fault(self) -> str | None:
        """What is wrong with the values, or None."""
        told = "must be finite and symmetric, with squares on the diagonal, as sums of x x' are"
        if not all(bool(torch.isfinite(rows).all()) for rows in self.rows):
            return told
        if self.total is None:
            return None
        diagonal = self.total.diagonal()
        most = _LOPSIDED * float(diagonal.max())
        for start in range(0, self.columns, _COMPARED):
            part = slice(start, start + _COMPARED)
            if not bool(((self.total[part] - self.total[:, part].t()).abs() <= most).all()):  # false for NaN, too
                return told
        return None if bool(torch.isfinite(self.total.sum())) and bool((diagonal >= 0).all()) else told

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        kept = [tensor for tensor in (self.squares, self.total, *self.rows) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def _fold(self, rows: list[Tensor]) -> None:
        for x in rows:
            if self.total is None:
                self.total = torch.zeros(self.columns, self.columns, dtype=torch.float32, device=x.device)
            self.total.addmm_(x.t(), x)


@dataclass
class HeldOut:
    """Rows that are not in the sums, to judge with.

    Attributes:
        columns: K.
        rows: `[R, K]`, in the type of the activations.
        weights: how many tokens each row stands for, f32 `[R]`.
        first: whether each row is the first token of a window, bool `[R]`.
    """

    columns: int
    rows: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    most: int = HELD_ROWS

    def add(self, rows: Tensor, weights: Tensor, first: Tensor) -> None:
        """Add the rows of one call. If there are too many, every second one that was added before is dropped."""
        if not len(rows):
            return
        kept = rows.detach().to(rows.dtype if rows.dtype.itemsize <= 2 else torch.float32, copy=True)
        self.rows.append(kept)
        self.weights.append(weights.to(kept.device, torch.float32, copy=True))
        self.first.append(first.to(kept.device, copy=True))
        if len(self) > 2 * self.most:
            self.finish()
            # Firsts and others are thinned out separately, so that each keeps its share.
            marks = self.first[0]
            index = torch.arange(len(marks), device=marks.device)
            keep = torch.cat([index[marks][::2], index[~marks][::2]]).sort()[0]
            self.rows, self.weights, self.first = [self.rows[0][keep]], [self.weights[0][keep]], [marks[keep]]

    def finish(self) -> None:
        """Join the rows of all calls."""
        if len(self.rows) > 1:
            device = self.rows[0].device
            for name in ("rows", "weights", "first"):
                setattr(self, name, [torch.cat([part.to(device) for part in getattr(self, name)])])

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(part.numel() * part.element_size() for part in self.rows)
