"""The second moments of single inputs, and what they mean for the layers that read them.

The first token of a window counts 65 times in front of queries, keys and values, and nowhere else. Attention heads park
their attention on this token (an attention sink), so an error of its value goes to all tokens behind it. But it is one
row of hundreds in H, and feedback would push the error exactly there. The mean squared gradient at the outputs of these
layers is more than a hundred times larger for this token than for others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .second import HeldOut, Second

FIRST = 64
"""How often the first token of a window counts in addition, in front of queries, keys and values."""

LENT = 256
"""Tokens that the moments of all experts count in those of an expert that saw fewer tokens than it has columns."""

# Last names of layers whose outputs are queries, keys or values, or become them: MLA makes them of two small latents.
# Linear attention keeps no sink, but its q, k and v read the same massive first token.
_ATTENTION = re.compile(
    r"(?:^|[._])(?:q|k|v|qkv|kv|qk)(?:_proj|_lin|_a_proj|_b_proj|_a_proj_with_mqa)?$"
    r"|(?:^|\.)(?:query|key|value|query_key_value|c_attn|Wqkv|Wq|Wk|Wv|wq|wk|wv|wq_a|wq_b|wkv_a_with_mqa|wkv_b)$"
    r"|(?:^|\.)in_proj_qkvz?$"
)
_ELSEWHERE = re.compile(r"(?:^|\.)(?:mlp|ffn|feed_forward|experts)\.")


def feeds_attention(layer: str) -> bool:
    """Whether the outputs of a layer are queries, keys or values, by the names that models use."""
    return _ATTENTION.search(layer) is not None and _ELSEWHERE.search(layer) is None


def joint_parts(layer: str, rows: int, columns: int) -> tuple[int, ...]:
    """Rows of the queries, keys and values in a joint matrix that has them one after the other; also of gate and up.

    Args:
        layer: its name.
        rows: N. Of q, k and v, as many are queries as there are columns, and keys and values have equal parts.
        columns: K.

    Returns:
        Their numbers; empty if the layer is no such matrix, or is not known to be one.
    """
    if layer.endswith("gate_up_proj") and rows % 2 == 0:  # where they are interleaved, two halves do no harm
        return rows // 2, rows // 2
    rest = rows - columns
    if layer.rpartition(".")[2] not in ("qkv_proj", "Wqkv", "c_attn") or rest <= 0 or rest % 2 or rest > 2 * columns:
        return ()
    return columns, rest // 2, rest // 2


@dataclass
class Input:
    """The moments of one distinct input, or of the rows that one expert reads of it.

    Attributes:
        total: over all tokens that are not held out.
        first: over the first tokens of windows; None if no layer in front of attention reads this input.
        held: rows that are not in the sums.
    """

    total: Second
    first: Second | None
    held: HeldOut

    def count(self, weighted: bool) -> int:
        """Number of tokens, where the first ones count more if `weighted`."""
        return self.total.count + (FIRST * self.first.count if weighted and self.first is not None else 0)

    def squares(self, weighted: bool) -> Tensor:
        """Sums of squares, f32 `[K]`, on the CPU."""
        squares = self.total.diagonal().to("cpu", copy=True)
        if weighted and self.first is not None:
            squares += FIRST * self.first.diagonal().cpu()
        return squares

    def matrix(self, weighted: bool) -> Tensor:
        """The sum of x x', f32 `[K, K]`. Do not write to it."""
        matrix = self.total.matrix()
        if weighted and self.first is not None and self.first.count:
            matrix = torch.add(matrix, self.first.matrix().to(matrix.device), alpha=FIRST)
        return matrix

    def judges(self, weighted: bool) -> tuple[Tensor, Tensor] | None:
        """The held-out rows `[R, K]` with their weights, f32 `[R]`; None if there are none."""
        if not len(self.held):
            return None
        self.held.finish()
        weights = self.held.weights[0]
        return self.held.rows[0], torch.where(
            self.held.first[0], weights * (1 + FIRST), weights
        ) if weighted else weights

    def fault(self) -> str | None:
        """What is wrong with the values, or None."""
        if not all(bool(torch.isfinite(rows).all()) for rows in self.held.rows):
            return "have held-out rows that are not finite"
        return next(
            (second.fault() for second in (self.total, self.first) if second is not None and second.fault()), None
        )

    def finish(self) -> None:
        for part in (self.total, self.first, self.held):
            if part is not None:
                part.finish()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in (self.total, self.first, self.held) if part is not None)


@dataclass(frozen=True)
class LayerMoments:
    """The moments of one layer, or of one stack of experts."""

    inputs: tuple[Input, ...]  # one, or one for each expert
    weighted: bool
    stacked: bool

    def enough(self, expert: int | None = None) -> bool:
        """Whether there is any token to learn from."""
        return self._of(expert).total.count > 0

    def matrix(self, expert: int | None = None) -> Tensor:
        """H: f32 `[K, K]`, the mean of x x'. Do not write to it.

        An expert with fewer tokens than columns borrows from the moments of all experts.

        Args:
            expert: number of the matrix in a stack; None for a layer.
        """
        own = self._of(expert)
        matrix, count = own.matrix(self.weighted), own.count(self.weighted)
        if self.stacked and own.total.count < own.total.columns:
            lender = self._all(matrix.device)
            if lender is not None:
                matrix, count = matrix + lender * LENT, count + LENT
        return matrix / max(1, count)

    def judges(self, expert: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Held-out rows `[R, K]` with their weights, f32 `[R]`; None if there are none."""
        return self._of(expert).judges(self.weighted)

    def _of(self, expert: int | None) -> Input:
        return self.inputs[expert or 0]

    def _all(self, device: torch.device) -> Tensor | None:
        """The mean over the tokens of all experts. It is computed once for a stack."""
        found = vars(self).get("_lent")
        if found is None:
            count = sum(each.total.count for each in self.inputs)
            if not count:
                return None
            columns = self.inputs[0].total.columns
            total = torch.zeros(columns, columns, dtype=torch.float32, device=device)
            for each in self.inputs:
                if each.total.count:
                    total += each.matrix(self.weighted).to(device)
            found = vars(self)["_lent"] = total / count
        return found


def importance_of_inputs(parts: Sequence[Input], weighted: bool, stacked: bool) -> tuple[Tensor, Tensor]:
    """Sums of squares and numbers of tokens in the shapes of `Imatrix`.

    Args:
        parts: the moments of an input, one for each expert of a stack.
        weighted: whether the first tokens count more.
        stacked: whether it is a stack of experts.
    """
    squares = torch.stack([part.squares(weighted) for part in parts])
    return squares if stacked else squares[0], torch.tensor([part.count(weighted) for part in parts])
