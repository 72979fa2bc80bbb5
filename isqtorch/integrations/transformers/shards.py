"""Packed weights that are sharded over processes: tensor parallelism and FSDP cut them like float weights.

Rows of a packed weight are independent, so it may be cut between any two rows. A row may only be cut between blocks:
any other cut would separate codes from their scale.
"""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from isqtorch.formats import QuantFormat, get_format
from isqtorch.integrations.record import METHOD
from isqtorch.modules import PackedModule, QuantEmbedding

FSDP_SINCE = "2.12"
"""The first version of torch whose FSDP2 accepts integer parameters, which cannot have a gradient."""


def is_sharded(parameter: object) -> bool:
    """Whether a parameter is a DTensor; False if torch is built without torch.distributed."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def check_fully_sharded(model: Any) -> None:
    """Check the request for FSDP2 before any weight is read.

    Raises:
        ValueError: FSDP2 is requested, and that of this torch refuses integer parameters.
    """
    asked = getattr(model.config, "distributed_config", None)
    if asked is not None and asked.dp_size > 1 and torch.__version__ < FSDP_SINCE:
        raise ValueError(
            f"{METHOD}: packed weights over {asked.dp_size} processes by FSDP2 need torch >= {FSDP_SINCE}, this is "
            f"{torch.__version__}, which refuses parameters of bytes. Update torch, or use tp_size."
        )


def check_shards(model: nn.Module) -> None:
    """Check that weights are cut between blocks. The result is the same in every process, so that all of them stop.

    Raises:
        ValueError: the columns of a packed weight are cut inside a block.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        for leaf, fmt_name in module.packed.items():
            parameter = module._parameters[leaf]
            if not is_sharded(parameter):
                continue
            pieces = _column_pieces(parameter)
            fmt, row_bytes = get_format(fmt_name), cast(Tensor, parameter).shape[-1]
            if row_bytes % (pieces * fmt.block_bytes) == 0:
                continue
            columns = fmt.in_features(row_bytes)
            path = name if leaf == "weight" else f"{name}.{leaf}"
            raise ValueError(
                f"{METHOD}: {path} is {fmt.name} with {columns} columns, which cannot be cut into {pieces} equal pieces of whole "
                f"blocks of {fmt.block}. Give this layer a format with smaller blocks by a topology entry, use another tp_size, or "
                "'replicate' it in the tp_plan."
            )


def local_columns(parameter: Any, fmt: QuantFormat) -> slice:
    """The columns of the weight that this process holds."""
    if not is_sharded(parameter):
        return slice(None)
    shape, offset = _share(parameter)
    start = offset[-1] // fmt.block_bytes * fmt.block
    return slice(start, start + shape[-1] // fmt.block_bytes * fmt.block)


def mark_rows(model: nn.Module) -> None:
    """Set `first_row` of embeddings whose rows are cut by tensor parallelism.

    Tensor parallelism sums the rows that all processes look up, so each must know which rows it holds. FSDP cuts rows
    too, but it gathers them again before a layer runs.
    """
    for module in model.modules():
        if isinstance(module, QuantEmbedding) and is_sharded(module.weight):
            module.first_row = _share(module.weight, "tp")[1][0]


def _share(parameter: Any, only: str | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this process's part. With `only`, only cuts along that dimension of the mesh count.

    Breaks if torch moves `compute_local_shape_and_global_offset`, which is private; test_parallel.py notices.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    placements = [
        placement if only in (None, name) else Replicate()
        for name, placement in zip(names, parameter.placements, strict=True)
    ]
    return compute_local_shape_and_global_offset(parameter.shape, mesh, placements)


def _column_pieces(parameter: Any) -> int:
    """Number of pieces that a row of a DTensor is cut into."""
    last = parameter.ndim - 1
    cuts = [
        (mesh_dim, placement)
        for mesh_dim, placement in enumerate(parameter.placements)
        if getattr(placement, "dim", None) in (last, -1)
    ]
    return prod(
        parameter.device_mesh.size(mesh_dim) * int(getattr(placement, "split_factor", 1))
        for mesh_dim, placement in cuts
    )
