"""Signs that bytes are not in the format that they are read as, taken from scales and offsets alone.

Several formats have the same size: 256 weights take 144 bytes in q4_0, q4k, afq4 and hqq4. If the name of the format is
lost or wrong, the shapes fit and the output is garbage. Bytes of another format give themselves away: their "scales"
are NaN, have an impossible sign, or spread over many powers of two, which no real weight does.

The bounds are wide. Of 64 x 1024 normally distributed weights, all scales lie within a factor of 16 of the median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FEW = 1 / 16  # share of impossible signs that may be an accident of another program's quantizer
_NEAR = 256.0  # factor around the median; at least half of the values must lie there
_SMALLEST, _LARGEST = 1e-12, 1e5  # of the median scale; f16 scales read as bf16 are about 1e-19
_FARTHEST = 16.0  # offset of a block in units of the range of its codes: the mean of real weights is near zero
_CONSTANT = 1e-6  # blocks with a smaller scale hold one value many times, and their offset may be anything


def as_f32(blocks: Tensor, offset: int, dtype: torch.dtype) -> NDArray[np.float32]:
    """The numbers of type `dtype` at `offset` of each block, f32 `[n]`. torch would need longer for so few numbers."""
    raw = blocks.numpy()[:, offset : offset + dtype.itemsize]
    if dtype == torch.bfloat16:
        return (raw.view(np.uint16)[:, 0].astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if dtype == torch.float16 else np.float32)[:, 0].astype(np.float32)


def fault(
    parts: Mapping[str, NDArray[np.float32]],
    never_negative: tuple[str, ...],
    offset: str | None,
    levels: int,
    in_steps: bool,
) -> str | None:
    """Say why the scales and offsets of some blocks cannot belong to real weights, or return None.

    Args:
        parts: name -> f32 `[n]`, the floating-point parts of n blocks; the scale comes first.
        never_negative: names of parts whose values are never negative.
        offset: name of the part that moves the codes, or None.
        levels: number of values of a code.
        in_steps: whether the offset counts steps of the scale, as a zero point does.
    """
    sizes = {name: np.sort(np.abs(values)) for name, values in parts.items()}  # NaN comes last
    for name, ordered in sizes.items():
        if not math.isfinite(ordered[-1]):
            bad = len(ordered) - int(np.count_nonzero(np.isfinite(ordered)))
            return f"{bad} of {len(ordered)} sampled values of {name!r} are NaN or infinite"
    for name in never_negative:
        share = np.count_nonzero(parts[name] < 0) / len(parts[name])
        if share > _FEW:
            return f"{share:.0%} of the sampled values of {name!r} are negative, and in this format none are"
    first = next(iter(parts))
    for name, ordered in sizes.items():
        ordered = ordered[_below(ordered, 0) :]  # zeros do not count
        if not len(ordered):
            continue
        median = float(ordered[len(ordered) // 2])
        if median > _LARGEST or (name == first and median < _SMALLEST):
            return f"the median of {name!r} is {median:.1g}, which no real weight has"
        near = _below(ordered, median * _NEAR) - _below(ordered, median / _NEAR, "left")
        if 2 * near < len(ordered):
            return f"the values of {name!r} spread from {ordered[0]:.1g} to {ordered[-1]:.1g}, as in no real weight"
    if offset is not None:
        live = sizes[first][_below(sizes[first], _CONSTANT) :]
        most = _FARTHEST * levels  # times 1 or the scale
        if len(live) and sizes[offset][-1] > most * (1 if in_steps else live[0]):  # else no block is far
            scale = np.abs(parts[first])
            far = np.abs(parts[offset]) > most * (1 if in_steps else scale)
            if 2 * np.count_nonzero(far & (scale > _CONSTANT)) > len(live):
                return f"{offset!r} puts the mean of the weights at over {_FARTHEST:.0f} times their range"
    return None


def _below(ordered: NDArray[np.float32], bound: float, side: Literal["left", "right"] = "right") -> int:
    """The number of values up to a bound; without the bound itself for the side "left"."""
    limit = np.float32(bound)
    if limit < ordered[0]:  # mostly: a comparison takes a tenth of the time of a search
        return 0
    return len(ordered) if limit > ordered[-1] else int(ordered.searchsorted(limit, side))
