"""HQQ: the half-quadratic solver of the hqq package, and the storage of its result in f16.

The solver searches for the zero point that minimizes the p-norm of the error (p = 0.7, to reduce the weight of
outliers). It stops when the mean error of the whole matrix no longer falls. Therefore a matrix must be solved in one
piece; solving it in parts gives other bytes, unless the number of steps is known. `rule="search"` starts from this
solution and searches for scales and zero points with a smaller error (`line_fit.py`).

The package allows no step below 5e-5, so it turns groups of small weights into a few levels or a constant. Such groups
take part in the solver as in the package, so that the other groups of the matrix get the package's bytes. What is
stored for them is the line from their smallest to their largest weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat

from .blocks import Blocks
from .denormals import blocks_per_chunk
from .line_fit import Line, error_weights, fit_lines
from .rounding import divide, f32, scale_to_16_bits

_ITERATIONS = 20
_BETA = 10.0
_P = 0.7
_LARGEST_INVERSE = 2e4  # the solver's steps are at least 5e-5
_SMALLEST_STEP = f32(5e-5)  # 1 / _LARGEST_INVERSE
_FLAT = 1e-4  # groups with a smaller range get scale 1 and become a constant
_FAR = 65504.0  # the largest f16
_SMALLEST_F16 = 2.0**-24
_EXACT = 2000.0  # integers up to 2048 are exact in f16


@dataclass(frozen=True)
class HqqSolution:
    """The result of the solver: `w ~ (codes - zero) * scale`."""

    codes: Tensor  # uint8 [groups, g]
    scale: Tensor  # f32 [groups]
    zero: Tensor  # f32 [groups]
    errors: tuple[float, ...]  # mean |error| before each update of the zero point


@dataclass(frozen=True)
class _HqqLine(Line):
    """`(level - zero) * scale`."""

    @classmethod
    def rounded(cls, scale: Tensor, low: Tensor, dtype: torch.dtype) -> _HqqLine:
        stored = scale.to(dtype).float()
        return cls(stored, (-low / stored).to(dtype).float())

    def position(self, x: Tensor) -> Tensor:
        return x * divide(1.0, self.scale) + self.second

    def value(self, level: Tensor) -> Tensor:
        return (level - self.second) * self.scale


def _mean(x: Tensor, dim: int | None = None) -> Tensor:
    """Compute the mean over one or all dimensions in f64, so that the order of summation hardly matters."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no f64
    return x.mean(dtype=wide) if dim is None else x.mean(dim=dim, keepdim=True, dtype=wide)


def hqq_solve(groups: Tensor, bits: int, *, round_zero: bool, steps: int | None = None) -> HqqSolution:
    """Find the zero points of all groups of one matrix.

    Args:
        groups: f32 `[groups, g]`, at least one group.
        bits: bits per code.
        round_zero: start from an integer zero point, as the package does by default for 4 bits.
        steps: how often to update the zero points; None: until the mean error of these groups no longer falls.

    Returns:
        The solution, with scale and zero not yet rounded for storage.
    """
    nmax = (1 << bits) - 1
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)  # [groups, 1]
    span = high - low
    inverse = torch.where(span <= _FLAT, 1.0, divide(nmax, span)).clamp(max=_LARGEST_INVERSE)
    zero = -low * inverse
    if round_zero:
        zero = zero.round()

    def encode() -> Tensor:
        return (groups * inverse + zero).round().clamp(0, nmax)

    best, errors = float("inf"), []
    for _ in range(_ITERATIONS if steps is None else steps):
        q = encode()
        error = groups - (q - zero) / inverse
        size = error.abs()
        shrunk = error.sign() * torch.relu(size - size ** (_P - 1) / _BETA)
        zero = _mean(q - (groups - shrunk) * inverse, dim=1).float()
        errors.append(float(_mean(size)))
        if steps is None and not errors[-1] < best:
            break
        best = errors[-1]
    return HqqSolution(encode().to(torch.uint8), divide(1.0, inverse)[:, 0], zero[:, 0], tuple(errors))


def store_f16(groups: Tensor, solution: HqqSolution, bits: int) -> Fields:
    """Round scale and zero to f16, and compute the codes with the rounded values.

    The zero point of a narrow group far from 0 may exceed the f16 range. Such a group gets a coarser scale, which puts
    the zero point at +-2000. Its values then keep the precision of f16 itself: |error| <= |w| / 4000. The scale is
    infinite if the range of a group is too large for f16.

    A group of small weights gets a finer scale than the solver's steps of 5e-5, if its zero point stays within +-2000.
    """
    nmax = (1 << bits) - 1
    offset = solution.zero * solution.scale
    far = solution.zero.abs() > _FAR
    scale = torch.where(far, divide(offset.abs(), _EXACT), solution.scale).half()
    step = scale.float()
    zero = torch.where(far, (offset / step).round(), solution.zero).half()
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    fine = torch.maximum(divide(high - low, nmax), divide(low.abs(), _EXACT)).clamp(min=_SMALLEST_F16)
    fine = scale_to_16_bits(fine, torch.float16)
    small = (low < high) & (fine.float() < _SMALLEST_STEP)
    scale = torch.where(small, fine, scale)
    step = scale.float()
    zero = torch.where(small, ((-low / step).round() + 0.0).half(), zero)  # + 0.0: no negative zero
    q = (groups / step[:, None] + zero.float()[:, None]).round().clamp(0, nmax)
    return {"scale": scale, "zero": zero, "q": q.to(torch.uint8)}


def count_steps(fmt: QuantFormat, w: Tensor) -> int:
    """Return how many steps the solver takes for a whole matrix, f32 `[N, K]` with N > 0."""
    return len(hqq_solve(w.reshape(-1, fmt.block), fmt.bits, round_zero=fmt.bits == 4).errors)


def solve(fmt: QuantFormat, blocks: Blocks, rule: str | None) -> Fields:
    """Return scale, zero and codes of one whole matrix, or of any groups of one if `blocks.steps` is given."""
    if blocks.x.shape[0] == 0:
        none = blocks.x.new_empty(0, dtype=torch.float16)
        return {"scale": none, "zero": none, "q": blocks.x.to(torch.uint8)}
    solution = hqq_solve(blocks.x, fmt.bits, round_zero=fmt.bits == 4, steps=blocks.steps)
    solved = store_f16(blocks.x, solution, fmt.bits)
    return solved if rule is None else _searched(fmt, blocks, solved)


def _searched(fmt: QuantFormat, blocks: Blocks, solved: Fields) -> Fields:
    """Search for better scales, zeros and codes. Groups are independent here, so this works in chunks."""
    done: list[Fields] = []
    chunk = blocks_per_chunk(fmt.block, blocks.x.device)
    for start in range(0, blocks.x.shape[0], chunk):
        here = slice(start, start + chunk)
        part = Blocks(blocks.x[here], None if blocks.importance is None else blocks.importance[here])
        line = _HqqLine(solved["scale"][here].float(), solved["zero"][here].float())
        found, codes = fit_lines(
            part.x.t().contiguous(),
            error_weights(part),
            (1 << fmt.bits) - 1,
            line,
            solved["q"][here].t(),
            torch.float16,
        )
        done.append({"scale": found.scale.half(), "zero": found.second.half(), "q": codes.t()})
    return {name: torch.cat([fields[name] for fields in done]) for name in solved}
