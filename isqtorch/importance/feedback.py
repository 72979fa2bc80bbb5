"""Pack a weight with error feedback, and judge the result on rows that were held out.

Feedback lowers the error of a layer's outputs on the calibration text. On other text it may do harm, if there were few
tokens or the text was of another kind. So the weight is also packed by the importance rule alone, and what has the smaller
error on the held-out rows is kept: for each layer, and for the queries, keys and values of a joint matrix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat
from isqtorch.policy.layers import LayerInfo
from isqtorch.quantizers import feedback_factor, scale_rule

from .inputs import LayerMoments
from .moments import Moments

LEAST_ROWS = 8
"""With fewer held-out rows a matrix is not judged, and packed by importance alone."""

_FACTORS = 4  # kept at a time: layers that share an input follow each other, and few other inputs come between them
_CHUNK = 1 << 24  # weights decoded at a time


def has_inputs(layers: Sequence[LayerInfo]) -> bool:
    """Whether the layers that share a weight have moments: linear layers and experts do, and a table that a head shares.

    Feedback then makes the outputs of the head exact at the cost of single numbers in the rows that the embedding reads.
    On SmolLM2 the divergence that the table causes is halved all the same.
    """
    kinds = {layer.kind for layer in layers}
    return bool(kinds & {"linear", "experts"}) and kinds <= {"linear", "experts", "embedding"}


class Shelf:
    """The moments that are in memory now, and the factors that were computed last.

    Attributes:
        moments: None while there are none.
    """

    def __init__(self, moments: Moments | None = None) -> None:
        self.moments = moments
        self._factors: OrderedDict[object, Tensor] = OrderedDict()

    def put(self, moments: Moments | None) -> None:
        """Replace the moments."""
        self._factors.clear()
        self.moments = moments

    def layer(self, names: Sequence[str], shape: tuple[int, ...]) -> LayerMoments | None:
        """The moments of a weight `[N, K]` or `[E, N, K]` under one of its names; None if there are none."""
        if self.moments is None:
            return None
        experts = shape[0] if len(shape) == 3 else None
        found = (self.moments.of(name, shape[-1], experts) for name in names)
        return next((layer for layer in found if layer is not None), None)

    def factor(self, layer: LayerMoments, expert: int | None, columns: slice, device: torch.device) -> Tensor:
        """The factor of an input, f32 `[K, K]`. Layers that read the same input get the same one.

        Args:
            layer: the moments.
            expert: number of the matrix in a stack.
            columns: the columns of the weight that are here; the others are in other processes.
            device: where it is wanted.
        """
        key = (id(layer.inputs[expert or 0]), layer.weighted, columns.start, columns.stop, device)
        found = self._factors.pop(key, None)
        if found is None:
            while len(self._factors) >= _FACTORS:
                self._factors.popitem(last=False)
            found = feedback_factor(layer.matrix(expert)[columns, columns].to(device))
        self._factors[key] = found
        return found


@dataclass(frozen=True)
class Judged:
    """What the held-out rows say about one matrix, or about one part of its rows.

    Attributes:
        rows: number of rows of the matrix.
        importance, feedback: squared errors of the outputs, with importance alone and with feedback.
        power: squares of the outputs.
    """

    rows: int
    importance: float
    feedback: float
    power: float

    @property
    def better(self) -> bool:
        """Whether feedback is kept."""
        return self.feedback < self.importance


def pack_by_feedback(
    weight: Tensor,
    fmt: QuantFormat,
    shelf: Shelf,
    layer: LayerMoments | None,
    importance: Tensor,
    expert: int | None = None,
    parts: Sequence[int] = (),
    columns: slice = slice(None),
) -> tuple[Tensor, Tensor, list[Judged]]:
    """Pack a matrix with feedback where this is better than importance alone.

    Args:
        weight: float `[N, K]`.
        fmt: the format.
        shelf: has the factors.
        layer: the moments of its inputs; None: there are none.
        importance: f32 `[K]`, the diagonal of H.
        expert: number of the matrix in a stack.
        parts: numbers of rows of its parts, such as queries, keys and values; they are judged by themselves.
        columns: the columns of the weight that are here.

    Returns:
        uint8 `[N, row_bytes]`; the same by importance alone; and what the held-out rows say about each part, with no
        entry if there was nothing to judge with.

    Raises:
        ValueError: as the operators `quantize` and `quantize_feedback`; or the moments are not finite.
    """
    rule = scale_rule(fmt)
    alone: Tensor = torch.ops.isqtorch.quantize(weight, fmt.name, importance, rule)
    judges = None if layer is None or not layer.enough(expert) else layer.judges(expert)
    if layer is None or judges is None or len(judges[0]) < LEAST_ROWS:
        return alone, alone, []
    factor = shelf.factor(layer, expert, columns, weight.device)
    fed: Tensor = torch.ops.isqtorch.quantize_feedback(weight, fmt.name, factor, importance, rule)
    rows = judges[0][:, columns].to(weight.device, torch.float32)
    errors = _errors(weight, (alone, fed), fmt, rows, judges[1].to(weight.device))  # [3, N]
    if not bool(torch.isfinite(errors).all()):
        raise ValueError("the held-out rows of its moments are not finite. Collect them again.")
    sizes = list(parts) if sum(parts) == len(weight) else [len(weight)]
    judged = [Judged(size, *part.sum(1).tolist()) for size, part in zip(sizes, errors.split(sizes, 1), strict=True)]
    if all(part.better for part in judged):
        return fed, alone, judged
    chosen = zip(judged, alone.split(sizes), fed.split(sizes), strict=True)
    return torch.cat([after if part.better else before for part, before, after in chosen]), alone, judged


def _errors(weight: Tensor, packed: Sequence[Tensor], fmt: QuantFormat, rows: Tensor, weights: Tensor) -> Tensor:
    """For each packed form the squared errors of the outputs, and the squares of the outputs: f64 `[forms + 1, N]`."""
    step = max(1, _CHUNK // weight.shape[1])
    out = []
    scaled = rows * weights.sqrt()[:, None]
    for start in range(0, len(weight), step):
        part = weight[start : start + step].float()
        decoded = [
            torch.ops.isqtorch.dequantize(each[start : start + step], fmt.name, torch.float32) for each in packed
        ]
        out.append(torch.stack([(scaled @ w.t()).square().sum(0) for w in (*(w - part for w in decoded), part)]))
    return torch.cat(out, dim=1).double().cpu()
