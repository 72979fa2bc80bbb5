"""Error feedback: the codes of a row are chosen one after the other, and each makes up for the errors before it.

A weight W `[N, K]` reads inputs x. With H = mean of x x' over calibration tokens, storing Q instead of W costs
`tr(D H D')`, D = Q - W. Let `H = V diag(d) V'` with V unit upper triangular. Then the cost is the sum over columns i of

    d[i] * |q_i - (w_i - sum over j < i of D[:, j] V[j, i])|**2

So the best code of column i, given the errors D of the columns before it, is the one nearest to w_i minus the errors that
V carries to column i. This is the method of OBQ, GPTQ and LDLQ: rows do not depend on each other, and no weight is
changed before its turn. The last columns cannot pass their errors on, and none looks ahead, so the result is good, not
optimal.

The scales of a block come from the format's own quantizer, when the block's turn comes. It sees the weights that would
make up for all errors before the block if they could be stored exactly. What its rule takes from a whole row (the mean
square) or matrix (HQQ's number of steps) comes from the original weights. An element whose target is still the weight
that the quantizer saw keeps the quantizer's code, so with a diagonal H the result is the quantizer's.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat

from .blocks import Blocks, row_mean_square
from .denormals import blocks_per_chunk, denormals_kept
from .families import Family, check_rule, family_of, uses_importance

_LEAST_DAMPING = 1e-6  # the next one after 0
_MOST_DAMPING = 1.0  # of the mean diagonal; with more than this, little is left of the moments
_ROWS_COMPARED = 1024  # at a time, to find out whether a matrix is symmetric
_LEVELS_AT_ONCE = 1 << 26  # f32 numbers


def feedback_factor(moments: Tensor, damping: float = 0.01) -> Tensor:
    """Factorize second moments for `quantize_feedback`: H + damping = V diag(d) V', V unit upper triangular.

    `damping * mean(diag H)` is added to the diagonal, and 1 for inputs that are always zero. If the matrix is still not
    positive definite in f32, the damping is raised tenfold until it is, up to the mean of the diagonal itself.

    Args:
        moments: f32 `[K, K]`, H = mean (or sum) of x x', symmetric.
        damping: share of the mean diagonal.

    Returns:
        V, f32 `[K, K]`, on the device of the moments.

    Raises:
        ValueError: `moments` is no matrix of second moments, or `damping` is not a number from 0 to 1.

    Example:
        x = torch.randn(1000, 64) @ torch.randn(64, 64)
        v = feedback_factor(x.t() @ x / len(x))
        print(v.shape, v.diagonal().unique())  # torch.Size([64, 64]) tensor([1.])
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
    upper: Tensor = lower.flip(0, 1)
    upper /= upper.diagonal().clone()  # column j by its diagonal element
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


def solve_feedback(
    fmt: QuantFormat, w: Tensor, factor: Tensor, importance: Tensor, rule: str | None = None
) -> tuple[Fields, Tensor, Tensor]:
    """Quantize a matrix with error feedback.

    On a CPU, the result does not depend on the number of threads, nor on the process's flush-to-zero mode.

    Args:
        fmt: the format.
        w: f32 `[N, K]`, finite, K a multiple of `fmt.block`.
        factor: f32 `[K, K]`, see `feedback_factor`. Only the part above the diagonal is read.
        importance: f32 `[K]`, >= 0, the diagonal of H. Ignored if the rule that chooses the scales does not use one.
        rule: alternative rule of the family for the scales; None is the default.

    Returns:
        The fields of the `N * K / block` blocks, in row order, as `solve`. The weights for which the quantizer chose the
        scales, f32 `[N, K]`. And those for which the codes were chosen: `w` minus the errors carried to it.

    Raises:
        ValueError: the family does not support `rule`.
    """
    check_rule(fmt, rule)
    family = family_of(fmt)
    vector = importance if uses_importance(fmt, rule) else None
    count = len(fmt.codes)
    chunk = max(1, _LEVELS_AT_ONCE // (count * fmt.block))
    if w.device.type == "cpu":
        chunk = min(chunk, blocks_per_chunk(max(count, fmt.block), w.device))
    done: list[Fields] = []
    seen, targets = [], []
    with denormals_kept() if w.device.type == "cpu" else nullcontext():
        steps = family.steps(fmt, w) if family.steps is not None and len(w) else None
        for start in range(0, max(1, len(w)), chunk):
            rows = w[start : start + chunk]
            power = row_mean_square(rows) if vector is not None and family.row_power else None
            fields, x, target = _solve_rows(fmt, family, rows, factor, Blocks(rows, vector, power, steps), rule)
            done.append(fields)
            seen.append(x)
            targets.append(target)
    joined = {name: torch.cat([fields[name] for fields in done]) for name in done[0]}
    return joined, torch.cat(seen), torch.cat(targets)


def _solve_rows(
    fmt: QuantFormat, family: Family, w: Tensor, factor: Tensor, whole: Blocks, rule: str | None
) -> tuple[Fields, Tensor, Tensor]:
    """Quantize rows, f32 `[n, K]`. `whole` has what the family's quantizer is told about them."""
    rows, columns = w.shape
    errors = w.new_zeros(columns, rows)
    blocks: list[Fields] = []
    seen, targets = [], []
    for start in range(0, columns, fmt.block):
        here = slice(start, start + fmt.block)
        carried = _carried(errors[:start], factor[:start, here])
        x = w[:, here] - _exact(carried, factor[here, here])
        importance = None if whole.importance is None else whole.importance[here].expand_as(x)
        chosen = family.solve(fmt, Blocks(x, importance, whole.row_power, whole.steps), rule)
        codes, errors[here] = _codes(fmt, chosen, x, w[:, here], carried, factor[here, here])
        blocks.append(fmt.with_codes(chosen, codes))
        seen.append(x)
        targets.append(w[:, here] - carried)
    # [n, blocks of a row, ...] -> in row order
    fields = {name: torch.stack([each[name] for each in blocks], dim=1).flatten(0, 1) for name in blocks[0]}
    return fields, torch.cat(seen, dim=1), torch.cat(targets, dim=1)


def _carried(errors: Tensor, factor: Tensor) -> Tensor:
    """Sum the errors of earlier columns times the factor: `[s, n]`, `[s, block]` -> `[n, block]`.

    On a CPU in the order of the columns, which is that of the native kernel.
    """
    if errors.device.type != "cpu":
        with torch.autocast(errors.device.type, enabled=False):
            return errors.t() @ factor
    total = errors.new_zeros(errors.shape[1], factor.shape[1])
    for error, row in zip(errors.unbind(0), factor.unbind(0), strict=True):
        total += error[:, None] * row
    return total


def _exact(carried: Tensor, factor: Tensor) -> Tensor:
    """Return what to subtract from the weights of a block so that all errors before it are made up for.

    The change of a column is carried to those behind it, as its errors are: d V = -carried, for the change d.

    Args:
        carried: `[n, block]`, the errors carried from other blocks.
        factor: V, `[block, block]`.

    Returns:
        -d, `[n, block]`.
    """
    change = carried.clone()
    for i in range(change.shape[1] - 1):
        change[:, i + 1 :] -= change[:, i : i + 1] * factor[i, i + 1 :]
    return change


def _codes(
    fmt: QuantFormat, chosen: Fields, x: Tensor, w: Tensor, carried: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose the codes of one block in each row, column by column.

    Args:
        fmt: the format.
        chosen: the fields of the blocks by the family's quantizer, which has seen x.
        x: `[n, block]`.
        w: `[n, block]`, the original weights.
        carried: `[n, block]`, the errors carried from other blocks. Those of the block itself are added in place.
        factor: `[block, block]`.

    Returns:
        Codes `[n, block]`, and errors `[block, n]`: what they stand for minus w.
    """
    q = chosen["q"]
    levels = torch.stack([fmt.decode({**chosen, "q": torch.full_like(q, code)}) for code in fmt.codes])
    sign = torch.where(levels[-1] < levels[0], -1.0, 1.0)
    levels = (levels * sign).permute(2, 0, 1)  # [block, codes, n], ascending in the order of codes
    last = levels.shape[1] - 1
    standing = fmt.decode(chosen)
    codes = torch.tensor(fmt.codes, dtype=q.dtype, device=q.device)
    columns, errors = [], []
    for i in range(fmt.block):
        target = w[:, i] - carried[:, i]
        turned = target * sign[:, i]
        above = (levels[i] < turned).sum(dim=0)  # the number of the first level that is not below the target
        low, high = (above - 1).clamp(min=0), above.clamp(max=last)
        down = turned - _at(levels[i], low)
        up = _at(levels[i], high) - turned
        rank = torch.where(down.abs() <= up.abs(), low, high)
        # the quantizer's code stands for the weight that it saw, and where all codes mean the same
        keep = (target == x[:, i]) | (levels[i, 0] == levels[i, last])
        columns.append(torch.where(keep, q[:, i], codes[rank]))
        value = torch.where(keep, standing[:, i], _at(levels[i], rank) * sign[:, i])
        errors.append(value - w[:, i])
        carried[:, i + 1 :] += errors[-1][:, None] * factor[i, i + 1 :]
    return torch.stack(columns, dim=1), torch.stack(errors)


def _at(levels: Tensor, rank: Tensor) -> Tensor:
    """Take one level of each lane: `[codes, n]`, `[n]` -> `[n]`."""
    return levels.gather(0, rank[None])[0]
