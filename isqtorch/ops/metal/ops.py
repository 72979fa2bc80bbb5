"""The operators on MPS tensors: checks, sizes and the choice of the kernel. The arithmetic is in csrc/metal.

The values of ids are not checked, because this would wait for the device. An id out of range gives a row of NaN in
`embedding`, and a row of zeros in `experts_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isqtorch.formats import QuantFormat
from isqtorch.ops.checks import (
    check_embedding,
    check_experts_shapes,
    check_finite,
    check_importance,
    check_linear,
    check_output_dtype,
    check_packed,
    check_quantize,
    format_named,
    refuse_scale,
)
from isqtorch.quantizers import uses_importance

from .chips import limits
from .formats import struct_of
from .library import IDS, Kernel, kernel, most_tokens

_GEMV = (8, 64)  # rows of the weight, and threads, per threadgroup of gemv.metal
_GEMM = (32, 128)  # the same for gemm.metal
_DECODED_AT_ONCE = 1 << 25  # number of weights that `linear` decodes at a time for torch's product


@torch.no_grad()
def quantize(w: Tensor, format: str, importance: Tensor | None = None, rule: str | None = None) -> Tensor:
    """Implement `reference.quantize`.

    The CPU does it for formats without a Metal quantizer, with an importance vector, and for rule "search".
    """
    fmt = format_named("quantize", format)
    row_bytes = check_quantize(w, fmt, importance, rule)
    check_importance(importance, w)
    importance = importance if uses_importance(fmt, rule) else None
    on_gpu = struct_of(fmt.name).quantizes and importance is None
    on_gpu = on_gpu and (rule is None or (fmt.solver == "affine" and rule == "mlx"))
    if not on_gpu or not w.numel():
        columns = None if importance is None else importance.cpu()
        packed: Tensor = torch.ops.isqtorch.quantize(w.detach().cpu(), format, columns, rule)
        return packed.to(w.device)
    w = w.detach().contiguous()
    out = torch.empty((*w.shape[:-1], row_bytes), dtype=torch.uint8, device=w.device)
    blocks = w.numel() // fmt.block
    faults = torch.full((2,), blocks, dtype=torch.int32, device=w.device)
    function = kernel("quantize", "quantize", fmt.name, w.dtype)
    function(w, out, faults, int(rule == "mlx"), blocks, threads=[-(-blocks // 64) * 64], group_size=[64])
    not_finite, overflow = faults.tolist()
    if not_finite < blocks:
        check_finite(w, w.float(), fmt)
    if overflow < blocks:
        refuse_scale(overflow, w.shape, fmt)
    return out


@torch.no_grad()
def dequantize(weight: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Implement `reference.dequantize`, with the same bits."""
    fmt = format_named("dequantize", format)
    k = check_packed("dequantize", weight, fmt)
    check_output_dtype("dequantize", dtype)
    out = torch.empty((*weight.shape[:-1], k), dtype=dtype, device=weight.device)
    if out.numel():
        function = kernel("dequantize", "dequantize", fmt.name, dtype)
        _by_units(function, (_aligned(weight), out, k), fmt, k, out.numel() // k)
    return out


@torch.no_grad()
def embedding(ids: Tensor, weight: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Implement `reference.embedding`, with the same bits. Ids out of range give NaN."""
    fmt = format_named("embedding", format)
    k = check_embedding(ids, weight, fmt, dtype)
    out = torch.empty((*ids.shape, k), dtype=dtype, device=weight.device)
    if out.numel():
        function = kernel("dequantize", f"embedding_{IDS[ids.dtype]}", fmt.name, dtype)
        _by_units(function, (_aligned(weight), ids.contiguous(), out, k, len(weight)), fmt, k, ids.numel())
    return out


def linear(x: Tensor, weight: Tensor, format: str, bias: Tensor | None = None) -> Tensor:
    """Implement `reference.linear`, with sums in f32."""
    fmt = format_named("linear", format)
    k = check_linear(x, weight, fmt, bias)
    n = len(weight)
    rows = x.detach().reshape(-1, k).contiguous()
    y = x.new_empty((*x.shape[:-1], n))
    if not y.numel():
        return y
    bias = None if bias is None else bias.detach().to(x.dtype).contiguous()
    m = len(rows)
    if m > limits().gemm:
        _decoded(rows, weight, fmt, bias, y.view(m, n))
        return y
    buffers = (_aligned(weight), rows, y if bias is None else bias, y)
    if m <= limits().gemv:
        tokens = max(count for count in range(1, most_tokens(struct_of(fmt.name)) + 1) if m % count == 0)
        function = kernel("gemv", f"gemv_{tokens}", fmt.name, x.dtype)
        _by_groups(function, (*buffers, n, k, int(bias is not None)), n, _GEMV, m // tokens)
    else:
        function = kernel("gemm", "gemm", fmt.name, x.dtype)
        _by_groups(function, (*buffers, m, n, k, int(bias is not None)), n, _GEMM, -(-m // tile_rows(x.dtype)))
    return y


def _decoded(x: Tensor, weight: Tensor, fmt: QuantFormat, bias: Tensor | None, y: Tensor) -> None:
    """Write x w^T + bias to y by torch's product; decode some rows of the weight at a time."""
    step = max(1, _DECODED_AT_ONCE // x.shape[1])
    for first in range(0, len(weight), step):
        w = dequantize(weight[first : first + step], fmt.name, x.dtype)
        y[:, first : first + step] = x @ w.t()
    if bias is not None:
        y += bias


def experts_linear(x: Tensor, weight: Tensor, format: str, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Implement `reference.experts_linear`. Ids out of range give zeros."""
    fmt = format_named("experts_linear", format)
    check_experts_shapes(x, weight, fmt, ids, bias)
    experts, n = weight.shape[:2]
    k, slots, pairs = x.shape[-1], ids.shape[1], ids.numel()
    rows, ids = x.detach().contiguous(), ids.contiguous()
    bias = None if bias is None else bias.detach().to(x.dtype).contiguous()
    y = x.new_zeros((*ids.shape, n))
    if not y.numel():
        return y
    buffers = (_aligned(weight), rows, y if bias is None else bias)
    if pairs <= limits().gemv * slots:
        function = kernel("gemv", f"experts_gemv_{IDS[ids.dtype]}", fmt.name, x.dtype)
        sizes = (n, k, int(bias is not None), experts, slots, int(x.ndim == 3))
        _by_groups(function, (*buffers, ids, y, *sizes), n, _GEMV, pairs)
    else:
        order, tiles = sorted_tiles(ids.reshape(-1), experts, tile_rows(x.dtype))
        function = kernel("gemm", "experts_gemm", fmt.name, x.dtype)
        rest = (n, k, int(bias is not None), 1 if x.ndim == 3 else slots)
        _by_groups(function, (*buffers, y, order, *tiles, *rest), n, _GEMM, len(tiles[0]))
    return y


def tile_rows(dtype: torch.dtype) -> int:
    """Return the number of rows of x in a tile of gemm.metal."""
    return 32 if dtype == torch.float16 else 16


def sorted_tiles(ids: Tensor, experts: int, height: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Sort pairs of a token and an expert by expert, and cut them into tiles of one expert, without a device sync.

    The number of tiles depends on the ids. So the largest possible number is returned; the last tiles may be empty.

    Args:
        ids: the expert of each pair, integers `[pairs]`. Pairs with ids outside 0 .. experts - 1 are in no tile.
        experts: number of experts.
        height: largest number of pairs in a tile.

    Returns:
        The order of the pairs, int32 `[pairs]`; and for each tile its expert, its first position in this order, and its
        number of pairs, int32 `[tiles]` each.
    """
    # int32 throughout: MPS lacks some functions for int64
    names = torch.arange(experts, dtype=torch.int32, device=ids.device)
    here = torch.where((ids >= 0) & (ids < experts), ids, experts).int()
    order = torch.argsort(here, stable=True).int()
    counts = (here[:, None] == names).sum(0, dtype=torch.int32)  # [experts]
    tiles_of = (counts + height - 1) // height
    ends = tiles_of.cumsum(0, dtype=torch.int32)
    tile = torch.arange(-(-len(ids) // height) + experts, dtype=torch.int32, device=ids.device)
    owner = torch.searchsorted(ends, tile, right=True, out_int32=True).clamp(max=experts - 1)
    of_owner = tile - (ends - tiles_of)[owner]  # which of its owner's tiles
    firsts = (counts.cumsum(0, dtype=torch.int32) - counts)[owner] + of_owner * height
    heights = (counts[owner] - of_owner * height).clamp(0, height)
    return order, (owner, firsts, heights)


# ---- launching -------------------------------------------------------------------------------------------------------


def _aligned(weight: Tensor) -> Tensor:
    """Return the weight, contiguous and at an even address: kernels read two bytes at a time."""
    weight = weight.contiguous()
    return weight.clone() if weight.storage_offset() % 2 else weight


def _by_units(function: Kernel, arguments: tuple[Tensor | int, ...], fmt: QuantFormat, k: int, rows: int) -> None:
    """Launch a kernel with one thread for each unit of each row."""
    units = k // struct_of(fmt.name).unit
    function(*arguments, threads=[units, rows], group_size=[min(units, 64), 1])


def _by_groups(
    function: Kernel, arguments: tuple[Tensor | int, ...], n: int, shape: tuple[int, int], groups: int
) -> None:
    """Launch `groups` threadgroups of `shape[1]` threads for every `shape[0]` rows of the weight."""
    rows, threads = shape
    function(*arguments, threads=[-(-n // rows) * threads, groups], group_size=[threads, 1])
