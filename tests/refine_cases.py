"""Models with planted errors for the tests of refinement, texts to learn from, and what a change of the scales does."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import tiny_llama
from torch import Tensor

import isqtorch
from isqtorch.formats import get_format
from isqtorch.formats.tunable import tunable_parts, untunable
from isqtorch.inplace.tuning import Scales

WINDOWS = torch.randint(1, 500, (24, 32), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(1, 500, (8, 32), generator=torch.Generator().manual_seed(1))


def models(fmt: str = "afq3", make: Any = tiny_llama, *, planted: float = 1.3, **options: Any) -> tuple[Any, Any]:
    """A small float model, and the same model packed, with scales that are too large by a factor.

    In a model with random weights nothing can be learned besides.
    """
    model = make(dtype=torch.float32) if make is tiny_llama else make()
    packed = copy.deepcopy(model)
    isqtorch.quantize_(packed, fmt, progress=False, **options)
    plant(packed, planted)
    return model, packed


def plant(packed: Any, factor: float) -> None:
    """Multiply the scales of all layers."""
    for layer in (module for module in packed.modules() if isinstance(module, isqtorch.QuantLinear)):
        form = get_format(layer.format)
        if untunable(form) is None:
            scale, _ = tunable_parts(form)
            blocks = layer.weight.plain.view(-1, form.block_bytes)[:, scale.offset : scale.offset + scale.nbytes]
            blocks.copy_((blocks.clone().view(scale.dtype) * factor).view(torch.uint8))


def refine(packed: Any, teacher: Any, **options: Any) -> isqtorch.Refinement:
    defaults = {"text": WINDOWS, "steps": 16, "learning_rate": 3e-2, "progress": False}
    return isqtorch.refine_(packed, teacher, **(defaults | options))


def divergence(model: Any, teacher: Any, windows: Tensor) -> float:
    with torch.no_grad():
        p, q = (torch.log_softmax(each(windows).logits.double(), -1) for each in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def moved(scales: Scales, which: int, block: int, by: float) -> Tensor:
    """The decoded weight, f64, if one change were `by` and nothing were rounded; by the definition of the units."""
    fmt = scales.fmt
    fields = fmt.unpack(scales.packed.view(-1, fmt.block_bytes))
    scale, offset = tunable_parts(fmt)
    d = fields[scale.name].float()
    values = {scale.name: d.clone()} | ({} if offset is None else {offset.name: fields[offset.name].float()})
    if which == 0:
        values[scale.name][block] *= 1 + by
        if offset is not None and not fmt.offset_times_integers and not fmt.offset_in_steps:
            values[offset.name][block] -= by * d[block] * (2**fmt.bits - 1) / 2
    else:
        assert offset is not None
        own = values[offset.name][block].clone() if fmt.offset_times_integers else d[block].abs()
        values[offset.name][block] += by * (1.0 if fmt.offset_in_steps else own)
    return fmt.decode({**fields, **values}).view(len(scales.packed), -1).double()
