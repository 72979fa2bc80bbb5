"""Error feedback: the codes of a row are chosen one after the other, and each makes up for the errors before it.

A weight W `[N, K]` reads inputs x. With H = mean of x x' over calibration tokens, storing Q instead of W costs
`tr(D H D')`, D = Q - W. Let `H = V diag(d) V'` with V unit upper triangular. Then the cost is the sum over columns i of

    d[i] * |q_i - (w_i - sum over j < i of D[:, j] V[j, i])|**2

So the best code of column i, given the errors D of the columns before it, is the one nearest to w_i minus the errors that
V carries to column i. This is the method of OBQ, GPTQ and LDLQ: rows do not depend on each other, and no weight is
changed before its turn.

The scales of a block come from the format's own quantizer, when the block's turn comes. It sees the weights that would
make up for all errors before the block if they could be stored exactly. What its rule takes from a whole row (the mean
square) or matrix (HQQ's number of steps) comes from the original weights. An element whose target is still the weight
that the quantizer saw keeps the quantizer's code, so with a diagonal H the result is the quantizer's.

Two things make up for the method's short sight (`curvature.py`):

- Columns of a block take turns in the order that costs least, not from left to right.
- The last columns cannot pass their errors on, and none looks ahead. So when a slab of 256 columns is rounded, each of its
  codes is chosen again, given all others of the slab. Columns behind the slab still make up for what they can. The
  scales stay.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat

from .blocks import Blocks, row_mean_square
from .curvature import best_order, couplings, curvature
from .denormals import blocks_per_chunk, denormals_kept
from .families import Family, check_rule, family_of, uses_importance

_LEAST_DAMPING = 1e-6  # the next one after 0
_MOST_DAMPING = 1.0  # of the mean diagonal; with more than this, little is left of the moments
_ROWS_COMPARED = 1024  # at a time, to find out whether a matrix is symmetric
_LEVELS_AT_ONCE = 1 << 26  # f32 numbers
_SLAB = 256  # columns, a multiple of every block


def feedback_factor(moments: Tensor, damping: float = 0.01) -> Tensor:
    """Factorize second moments for `quantize_feedback`: H + damping = V diag(d) V', V unit upper triangular.

    The result has V above its diagonal, and d on it, divided by the largest.

    `damping * mean(diag H)` is added to the diagonal, and 1 for inputs that are always zero. If the matrix is still not
    positive definite in f32, the damping is raised tenfold until it is, up to the mean of the diagonal itself.

    Args:
        moments: f32 `[K, K]`, H = mean (or sum) of x x', symmetric.
        damping: share of the mean diagonal.

    Returns:
        f32 `[K, K]`, upper triangular, on the device of the moments.

    Raises:
        ValueError: `moments` is no matrix of second moments, or `damping` is not a number from 0 to 1.

    Example:
        x = torch.randn(1000, 64) @ torch.randn(64, 64)
        factor = feedback_factor(x.t() @ x / len(x))
        print(factor.shape, bool((factor.diagonal() > 0).all()))  # torch.Size([64, 64]) True
    """
    if not 0 <= damping <= _MOST_DAMPING:
        raise ValueError(
            f"feedback_factor: damping must be from 0 to {_MOST_DAMPING}, a share of the mean diagonal; got {damping!r}."
        )
    _check_moments(moments)
    h = moments.detach().float()
    diagonal = h.diagonal()
    mean = float(diagonal.double().mean() if h.device.type != "mps" else diagonal.mean())
    dead = (diagonal == 0).to(h.dtype)
    share = damping
    while True:
        turned = h.flip(0, 1)  # the Cholesky factor of the turned matrix, turned back, is upper triangular
        turned.diagonal().add_((dead + share * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not bool(failed):
            break
        share = max(10 * share, _LEAST_DAMPING)
        if share > _MOST_DAMPING:
            raise ValueError(
                f"feedback_factor: the moments {list(h.shape)} are not positive definite, even with their mean diagonal added. "
                "A mean of x x' is; collect them again."
            )
    del turned
    upper: Tensor = lower.flip(0, 1).contiguous()
    roots = upper.diagonal().clone()
    upper /= roots  # column j by its diagonal element
    shares = (roots / roots.max()).square()
    upper.diagonal().copy_(shares.clamp(min=torch.finfo(torch.float32).tiny))
    return upper


def _check_moments(moments: Tensor) -> None:
    """Check that moments are a symmetric float matrix of finite numbers whose diagonal is not negative."""
    if not moments.is_floating_point() or moments.ndim != 2 or moments.shape[0] != moments.shape[1] or not len(moments):
        raise ValueError(
            f"feedback_factor: moments must be a float matrix [K, K], got {moments.dtype} {list(moments.shape)}."
        )
    diagonal = moments.diagonal()
    bad = ~((diagonal >= 0) & diagonal.isfinite())
    if bool(bad.any()):
        first = int(bad.int().argmax())
        raise ValueError(
            f"feedback_factor: moments[{first}, {first}] is {float(diagonal[first]):.6g}; a mean of squares is finite and not "
            "negative. Collect them again."
        )
    most = float(diagonal.max())
    for start in range(0, len(moments), _ROWS_COMPARED):
        rows = slice(start, start + _ROWS_COMPARED)
        if not bool(((moments[rows] - moments[:, rows].t()).abs() <= 1e-3 * most).all()):
            raise ValueError(
                f"feedback_factor: moments {list(moments.shape)} must be finite and symmetric, as a mean of x x' is. Collect "
                "them again."
            )


@dataclass(frozen=True)
class _Slab:
    """Columns whose codes are chosen together.

    Attributes:
        columns: where they are.
        blocks: of each block in the slab, the order of its columns, and V in this order.
        couplings: see `curvature.couplings`; None if they are not finite, and the codes are not chosen again.
    """

    columns: slice
    blocks: list[tuple[list[int], Tensor]]
    couplings: Tensor | None


def _slabs(factor: Tensor, block: int) -> list[_Slab]:
    """Prepare the slabs of a factor `[K, K]`."""
    slabs = []
    for start in range(0, len(factor), _SLAB):
        here = slice(start, min(start + _SLAB, len(factor)))
        blocks = []
        for at in range(start, here.stop, block):
            v = factor[at : at + block, at : at + block]
            order, turned = best_order(curvature(v)) or (torch.arange(block), v)
            blocks.append((order.tolist(), turned))
        u = couplings(curvature(factor[here, here]))
        slabs.append(_Slab(here, blocks, u if bool(u.isfinite().all()) else None))
    return slabs


class _Codes:
    """The codes of one block in each row, and what they stand for.

    Attributes:
        codes: `[n, block]`.
        values: `[n, block]`.
    """

    def __init__(self, fmt: QuantFormat, chosen: Fields) -> None:
        """Start with what the family's quantizer has chosen."""
        self.fmt, self.chosen = fmt, chosen
        self.codes, self.values = chosen["q"].clone(), fmt.decode(chosen)
        levels = torch.stack([fmt.decode({**chosen, "q": torch.full_like(self.codes, code)}) for code in fmt.codes])
        self._sign = torch.where(levels[-1] < levels[0], -1.0, 1.0)
        self._levels = (levels * self._sign).permute(2, 0, 1)  # [block, codes, n], ascending in the order of codes
        self._all = torch.tensor(fmt.codes, dtype=self.codes.dtype, device=self.codes.device)

    def choose(self, i: int, target: Tensor, seen: Tensor) -> None:
        """Choose the code of element i that is nearest to a target `[n]`, the first of two that are equally near.

        The present code stays where the target is the weight that it stands for, `seen`, and where all codes mean the
        same. So it does where the target is not finite.
        """
        levels, sign = self._levels[i], self._sign[:, i]
        last = len(levels) - 1
        turned = target * sign
        above = (levels < turned).sum(dim=0)  # the number of the first level that is not below the target
        low, high = (above - 1).clamp(min=0), above.clamp(max=last)
        down, up = turned - _at(levels, low), _at(levels, high) - turned
        rank = torch.where(down.abs() <= up.abs(), low, high)
        keep = (target == seen) | (levels[0] == levels[last]) | ~target.isfinite()
        self.codes[:, i] = torch.where(keep, self.codes[:, i], self._all[rank])
        self.values[:, i] = torch.where(keep, self.values[:, i], _at(levels, rank) * sign)

    def fields(self) -> Fields:
        """The fields of the blocks."""
        return self.fmt.with_codes(self.chosen, self.codes)


def solve_feedback(
    fmt: QuantFormat, w: Tensor, factor: Tensor, importance: Tensor, rule: str | None = None
) -> tuple[Fields, Tensor, Tensor]:
    """Quantize a matrix with error feedback.

    On a CPU, the result does not depend on the number of threads, nor on the process's flush-to-zero mode.

    Args:
        fmt: the format.
        w: f32 `[N, K]`, finite, K a multiple of `fmt.block`.
        factor: f32 `[K, K]`, see `feedback_factor`. The part below the diagonal is not read.
        importance: f32 `[K]`, >= 0, the diagonal of H. Ignored if the rule that chooses the scales does not use one.
        rule: alternative rule of the family for the scales; None is the default.

    Returns:
        The fields of the `N * K / block` blocks, in row order, as `solve`. The weights for which the quantizer chose the
        scales, f32 `[N, K]`. And those for which the codes were chosen first, with the errors made up for.

    Raises:
        ValueError: the family does not support `rule`.
    """
    check_rule(fmt, rule)
    family = family_of(fmt)
    vector = importance if uses_importance(fmt, rule) else None
    count = len(fmt.codes)
    chunk = max(1, _LEVELS_AT_ONCE // (count * _SLAB))
    if w.device.type == "cpu":
        chunk = min(chunk, blocks_per_chunk(max(count, _SLAB), w.device))
    done: list[Fields] = []
    seen, targets = [], []
    with denormals_kept() if w.device.type == "cpu" else nullcontext():
        steps = family.steps(fmt, w) if family.steps is not None and len(w) else None
        slabs = _slabs(factor, fmt.block)
        for start in range(0, max(1, len(w)), chunk):
            rows = w[start : start + chunk]
            power = row_mean_square(rows) if vector is not None and family.row_power else None
            whole = Blocks(rows, vector, power, steps)
            fields, x, target = _solve_rows(fmt, family, rows, factor, slabs, whole, rule)
            done.append(fields)
            seen.append(x)
            targets.append(target)
    joined = {name: torch.cat([fields[name] for fields in done]) for name in done[0]}
    return joined, torch.cat(seen), torch.cat(targets)


def _solve_rows(
    fmt: QuantFormat, family: Family, w: Tensor, factor: Tensor, slabs: list[_Slab], whole: Blocks, rule: str | None
) -> tuple[Fields, Tensor, Tensor]:
    """Quantize rows, f32 `[n, K]`. `whole` has what the family's quantizer is told about them."""
    errors = w.new_zeros(w.shape[1], len(w))
    done: list[Fields] = []
    seen, targets = [], []
    for slab in slabs:
        begin, here = slab.columns.start, slab.columns
        from_slabs = _sums(errors[:begin], factor[:begin, here])
        parts: list[_Codes] = []
        for order, v in slab.blocks:
            start = begin + len(parts) * fmt.block
            block = slice(start, start + fmt.block)
            carried = _sums(
                errors[begin:start], factor[begin:start, block], from_slabs[:, start - begin : block.stop - begin]
            )
            x = w[:, block] - _exact(carried, factor[block, block])
            importance = None if whole.importance is None else whole.importance[block].expand_as(x)
            part = _Codes(fmt, family.solve(fmt, Blocks(x, importance, whole.row_power, whole.steps), rule))
            targets.append(_round(part, x, order, v))
            errors[block] = (part.values - w[:, block]).t()
            parts.append(part)
            seen.append(x)
        if slab.couplings is not None:
            _sweep(parts, w[:, here] - _exact(from_slabs, factor[here, here]), slab.couplings)
            errors[here] = (torch.cat([part.values for part in parts], dim=1) - w[:, here]).t()
        done += [part.fields() for part in parts]
    # [n, blocks of a row, ...] -> in row order
    fields = {name: torch.stack([each[name] for each in done], dim=1).flatten(0, 1) for name in done[0]}
    return fields, torch.cat(seen, dim=1), torch.cat(targets, dim=1)


def _round(part: _Codes, x: Tensor, order: list[int], v: Tensor) -> Tensor:
    """Choose the codes of one block in each row, column by column.

    Args:
        part: the codes.
        x: `[n, block]`, what the block should be, so that all errors before it are made up for.
        order: the order of its columns.
        v: `[block, block]`, V in this order.

    Returns:
        The targets of the codes, `[n, block]`.
    """
    carried, targets = torch.zeros_like(x), torch.empty_like(x)
    for position, i in enumerate(order):
        targets[:, i] = x[:, i] - carried[:, position]
        part.choose(i, targets[:, i], x[:, i])
        rest = part.values[:, i] - x[:, i]
        carried[:, position + 1 :] += rest[:, None] * v[position, position + 1 :]
    return targets


def _sweep(parts: list[_Codes], x: Tensor, u: Tensor) -> None:
    """Choose each code of a slab again, given all others.

    Args:
        parts: the codes of its blocks.
        x: `[n, s]`, what the slab should be, so that all errors before it are made up for.
        u: `[s, s]`, its couplings.
    """
    block = parts[0].values.shape[1]
    values = torch.cat([part.values for part in parts], dim=1)
    sums = _sums((values - x).t(), u)
    for i in range(x.shape[1]):
        part, j = parts[i // block], i % block
        before = part.values[:, j].clone()
        part.choose(j, x[:, i] - sums[:, i], x[:, i])
        change = part.values[:, j] - before
        sums += change[:, None] * u[i]


def _sums(errors: Tensor, factor: Tensor, before: Tensor | None = None) -> Tensor:
    """Sum the errors of columns times the factor: `[s, n]`, `[s, c]` -> `[n, c]`.

    On a CPU in the order of the columns, which is that of the native kernel.

    Args:
        errors, factor: the factors of the product.
        before: sums to begin with.
    """
    total = errors.new_zeros(errors.shape[1], factor.shape[1]) if before is None else before.clone()
    if errors.device.type != "cpu":
        with torch.autocast(errors.device.type, enabled=False):
            return total + errors.t() @ factor
    for error, row in zip(errors.unbind(0), factor.unbind(0), strict=True):
        total += error[:, None] * row
    return total


def _exact(carried: Tensor, factor: Tensor) -> Tensor:
    """Return what to subtract from the weights of some columns so that all errors before them are made up for.

    The change of a column is carried to those behind it, as its errors are: d V = -carried, for the change d.

    Args:
        carried: `[n, s]`, the errors carried from other columns.
        factor: V above the diagonal, `[s, s]`.

    Returns:
        -d, `[n, s]`.
    """
    change = carried.clone()
    for i in range(change.shape[1] - 1):
        change[:, i + 1 :] -= change[:, i : i + 1] * factor[i, i + 1 :]
    return change


def _at(levels: Tensor, rank: Tensor) -> Tensor:
    """Take one level of each lane: `[codes, n]`, `[n]` -> `[n]`."""
    return levels.gather(0, rank[None])[0]
