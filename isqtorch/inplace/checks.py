"""Checks of weights, devices and kernels before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from isqtorch.modules import PackedModule
from isqtorch.modules.convert import owner_of, parameter_name, weight_matrix
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.policy.request import Request, checked_device

from .damage import Watch
from .pack import Job, pack_weight

_F16_SCALES_HOLD = 6e4  # smaller weights cannot overflow the 16-bit scale or offset of any format


def check_devices(request: Request) -> None:
    """ValueError unless all devices in a request are available."""
    if request.device is not None:
        checked_device(request.device, f"{request.op}: device")
    for entry in request.topology.entries:
        if entry.device is not None:
            checked_device(entry.device, f"{request.op}: topology entry {entry.key!r}: device")


def check_weights(model: nn.Module, jobs: Sequence[Job], op: str) -> None:
    """ValueError unless the model's own weights can be packed as decided."""
    for job in jobs:
        _check_weight(model, job, op)


def check_kernels(jobs: Sequence[Job], op: str) -> None:
    """Pack one block in each format: a missing kernel must raise before the first layer changes."""
    for job in {job.fmt.name: job for job in jobs}.values():
        try:
            pack_weight(
                torch.zeros(1, job.fmt.block), replace(job, importance=None, feedback=None, watch=Watch(), damages=[])
            )
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None


def _check_weight(model: nn.Module, job: Job, op: str) -> None:
    """ValueError unless every weight of the layer is finite and the format's scales can hold it."""
    module, leaf = owner_of(model, job.names[0])
    name = parameter_name(model, job.names[0])
    weight = cast(Tensor, getattr(module, leaf))
    if weight.device.type == "meta":
        raise ValueError(
            f"{op}: {name} is on the meta device and has no values. Load the weights first; isqtorch.plan works without."
        )
    with ordinary_tensors():
        if isinstance(module, PackedModule) and leaf in module.packed:
            matrix = decoded = torch.ops.isqtorch.dequantize(weight, module.packed[leaf], torch.float32)
        else:
            matrix, decoded = weight_matrix(module, leaf).detach(), weight
        low, high = decoded.aminmax()  # propagates NaN, and allocates no tensor of the weight's size
        if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
            if max(-float(low), float(high)) > _F16_SCALES_HOLD:
                _check_scales(matrix, job, op)
            return
        position = _first_bad(decoded)
        raise ValueError(
            f"{op}: {name}[{', '.join(map(str, position))}] is {decoded[position].item()}; weights must be finite. Repair the "
            "checkpoint, or leave the layer out with exclude. Nothing was changed."
        )


def _check_scales(matrix: Tensor, job: Job, op: str) -> None:
    """Pack a weight with very large values on trial: only the quantizer can tell whether a scale overflows."""
    try:
        pack_weight(matrix, replace(job, feedback=None, watch=Watch(), damages=[]))
    except ValueError as error:
        raise ValueError(f"{op}: {job.names[0]}: {error} Or exclude the layer. Nothing was changed.") from None


def _first_bad(weight: Tensor) -> tuple[int, ...]:
    """Position of the first weight that is NaN or infinite; there must be one."""
    for row in range(weight.shape[0]):
        bad = (~torch.isfinite(weight[row])).nonzero()
        if len(bad):
            return row, *bad[0].tolist()
    raise AssertionError("all weights are finite")
