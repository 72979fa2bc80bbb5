"""Checks of the operators' arguments, with the same messages for all implementations.

Checks of values (finite weights, ids in range) wait for the device. All checks raise ValueError unless noted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from isqtorch.formats import Fields, QuantFormat, formats, get_format
from isqtorch.quantizers import check_rule

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHT_DTYPES = (*ACTIVATION_DTYPES, torch.float64)
_IDS = (torch.int64, torch.int32)
_MOST_COLUMNS = 1 << 40  # of a row; larger sizes make no sense, and their bytes could overflow in the kernels
_MOST_ELEMENTS = 1 << 60  # of a result
MOST_IMPORTANCE = 2.0**40  # the sums of the searches hold its square; larger ones leave the range of f32


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _position(index: int, shape: torch.Size) -> str:
    """Format a flat index as coordinates: 5 in a 2 x 3 tensor is "1, 2"."""
    parts = []
    for size in reversed(shape):
        index, i = divmod(index, size)
        parts.append(str(i))
    return ", ".join(reversed(parts))


def _first(bad: Tensor) -> int | None:
    """Return the flat index, in row-major order, of the first True, or None if there is none."""
    flat = bad.reshape(-1)
    if not bool(flat.any()):
        return None
    return int(flat.int().argmax())


def format_named(op: str, name: str) -> QuantFormat:
    """Return the format of this canonical name. The kernels know no other spelling."""
    if name not in _NAMES:
        shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in name[:60]) + "..." * (len(name) > 60)
        raise ValueError(f'{op}: no kernels for the format "{shown}". There are kernels for {", ".join(_NAMES)}.')
    return get_format(name)


_NAMES = formats(variants=True)


def check_devices(op: str, weight: Tensor, **others: Tensor | None) -> None:
    """Check that all tensors are on the weight's device. The argument `ids` is a plural."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != weight.device:
            verb = "are" if name == "ids" else "is"
            raise ValueError(
                f"{op}: {name} {verb} on {tensor.device}, the weight on {weight.device}. Move one of them."
            )


def check_size(shape: Sequence[int]) -> None:
    """Check that the sizes of a result do not overflow. Symbolic sizes are those of tensors that exist, and pass."""
    elements = math.prod(max(size, 1) for size in shape if isinstance(size, int))
    if elements > _MOST_ELEMENTS:
        raise ValueError(f"isqtorch: a result of shape {list(shape)} is larger than any memory. Split the arguments.")


def check_weight(w: Tensor, fmt: QuantFormat) -> int:
    """Check that a weight is float, has at least two dimensions, and has rows of whole blocks.

    Returns:
        Bytes of a packed row.
    """
    if w.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"quantize: weight must be one of {_names(WEIGHT_DTYPES)}, got {_spelled(w.dtype)}.")
    if w.ndim < 2:
        raise ValueError(
            f"quantize: weight must have at least 2 dimensions [N, K], got shape {list(w.shape)}. "
            "Vectors (biases, norms) are left as they are."
        )
    row_bytes = fmt.row_bytes(w.shape[-1])
    if w.shape[-1] > _MOST_COLUMNS:
        raise ValueError(f"{fmt.name}: in_features must not be more than 2**40, got {w.shape[-1]}.")
    return row_bytes


def check_quantize(w: Tensor, fmt: QuantFormat, importance: Tensor | None, rule: str | None) -> int:
    """Check everything about the arguments of `quantize` except their values.

    Returns:
        Bytes of a packed row.
    """
    row_bytes = check_weight(w, fmt)
    check_rule(fmt, rule)
    if importance is not None:
        check_importance_shape(importance, w)
    check_size((*w.shape[:-1], row_bytes))
    return row_bytes


def check_finite(w: Tensor, w32: Tensor, fmt: QuantFormat) -> None:
    """Check that weights are finite after conversion to f32 (`w32`)."""
    if bool(w32.isfinite().all()):
        return
    first = _first(~w32.isfinite())
    assert first is not None
    value = float(w.reshape(-1)[first])
    fault = f"is {value:.6g}, which float32 cannot hold" if math.isfinite(value) else f"is {value}"
    raise ValueError(
        f"quantize: weight[{_position(first, w.shape)}] {fault}; {fmt.name} needs finite values. "
        "Repair the checkpoint, or leave this weight out."
    )


def check_scales(fields: Fields, w: Tensor, fmt: QuantFormat) -> None:
    """Check that the scales chosen by a quantizer are finite; 16-bit scales overflow if weights are very large.

    With f16 scales, weights above 2**30 are refused, too. No such format can represent them (the largest
    range is 65504 * 128 * 32), and the sums in the searches overflow, which may give a finite but meaningless scale.

    Args:
        fields: the fields of all blocks, in the order of the weight.
        w: f32 `[..., K]`.
        fmt: the format.
    """
    scales = [values for name, values in fields.items() if values.is_floating_point() and name != "s"]  # s: q8_1's sum
    if not scales:  # mxfp4: a power of two fits every weight
        return
    bad = torch.zeros_like(scales[0], dtype=torch.bool)  # [n]
    for values in scales:
        bad |= ~values.isfinite()
    if scales[0].dtype == torch.float16:
        bad |= (w.reshape(bad.numel(), fmt.block).abs() > 2.0**30).any(dim=1)
    first = _first(bad)
    if first is not None:
        refuse_scale(first, w.shape, fmt)


def refuse_scale(block: int, shape: torch.Size, fmt: QuantFormat) -> NoReturn:
    """Raise the error for a weight of this shape whose block number `block` needs a scale that overflows 16 bits."""
    way_out = "Scale the weight down, or use a format with a wider scale (q8k, fp8)"
    if fmt.name.endswith(".f16"):
        way_out = f"Use {fmt.name.removesuffix('.f16')}, which has bf16 scales"
    raise ValueError(
        f"quantize: the block of {fmt.name} from weight[{_position(block * fmt.block, shape)}] on holds values too large "
        f"for its 16-bit scale. {way_out}."
    )


def check_importance_shape(importance: Tensor, w: Tensor) -> None:
    """Check that importance is float, has one value per column, and is on the weight's device or on the CPU."""
    columns, matrices = w.shape[-1], w.shape[:-2]
    if importance.shape not in ((columns,), (*matrices, columns)):
        own = f", or {[*matrices, columns]}, one vector per matrix" if matrices else ""
        raise ValueError(
            f"quantize: importance must have shape [{columns}], one value per column of the weight{own}; "
            f"got {list(importance.shape)}. Is this the entry of another layer?"
        )
    if importance.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"quantize: importance must be a float tensor, got {_spelled(importance.dtype)}.")
    if importance.device.type != "cpu":
        check_devices("quantize", w, importance=importance)


def check_importance(importance: Tensor | None, w: Tensor) -> Tensor | None:
    """Check importance: see `check_importance_shape`; each value must be between 0 and 2**40.

    Returns:
        f32 on the weight's device: `[1, K]` for all matrices, or `[matrices, K]`; None if `importance` is None.
    """
    if importance is None:
        return None
    check_importance_shape(importance, w)
    vector = importance.detach().to(w.device, torch.float32)
    first = _first(~((vector >= 0) & (vector <= MOST_IMPORTANCE)))
    if first is not None:
        raise ValueError(
            f"quantize: importance[{_position(first, importance.shape)}] is {float(vector.reshape(-1)[first]):.6g}; "
            "importance must be finite, not negative and at most 2**40. Only its ratios count: divide it by its maximum."
        )
    return vector.reshape(-1, w.shape[-1])


def check_packed(op: str, weight: Tensor, fmt: QuantFormat, *, matrix: bool = False) -> int:
    """Check that a packed weight is uint8 and has rows of whole blocks; with `matrix`, that it has two dimensions.

    Returns:
        K, the number of weights in a row.
    """
    if weight.dtype != torch.uint8:
        raise ValueError(
            f"{op}: a packed weight is uint8, got {_spelled(weight.dtype)}. Pack it with isqtorch.quantize."
        )
    if weight.ndim < 2 or (matrix and weight.ndim != 2):
        wanted = "2 dimensions [N, row_bytes]" if matrix else "at least 2 dimensions [N, row_bytes]"
        raise ValueError(f"{op}: a packed weight must have {wanted}, got shape {list(weight.shape)}.")
    columns = fmt.in_features(weight.shape[-1])
    if columns > _MOST_COLUMNS:
        raise ValueError(
            f"{fmt.name}: a packed row must not have more than 2**40 weights, got {weight.shape[-1]} bytes."
        )
    return columns


def check_dequantize(weight: Tensor, fmt: QuantFormat, dtype: torch.dtype) -> int:
    """Check all arguments of `dequantize`, and return K."""
    columns = check_packed("dequantize", weight, fmt)
    check_output_dtype("dequantize", dtype)
    check_size((*weight.shape[:-1], columns))
    return columns


def check_output_dtype(op: str, dtype: torch.dtype) -> None:
    """Check that the dtype of a result is f32, f16 or bf16."""
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{op}: dtype must be one of {_names(ACTIVATION_DTYPES)}, got {_spelled(dtype)}.")


def check_w8a8(format: str) -> None:
    """Check that the weight's format is fp8: for other formats, activations cannot be rounded to FP8."""
    if format != "fp8":
        raise ValueError(
            f'linear_w8a8: activations are rounded to FP8 for weights in fp8 alone, got "{format}". Use linear.'
        )


def check_linear(x: Tensor, weight: Tensor, fmt: QuantFormat, bias: Tensor | None) -> int:
    """Check types, shapes and devices of the arguments of `linear`.

    Returns:
        K.
    """
    columns = check_packed("linear", weight, fmt, matrix=True)
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"linear: x must be one of {_names(ACTIVATION_DTYPES)}, got {_spelled(x.dtype)}.")
    if x.ndim < 1 or x.shape[-1] != columns:
        raise ValueError(
            f"linear: the last dimension of x must be {columns}, the in_features of this {fmt.name} weight, "
            f"got shape {list(x.shape)}."
        )
    check_devices("linear", weight, x=x)
    check_bias("linear", bias, weight)
    check_size((*x.shape[:-1], weight.shape[0]))
    return columns


def check_bias(op: str, bias: Tensor | None, weight: Tensor) -> None:
    """Check that a bias has one value per row of the weight, a type of activations, and the weight's device."""
    if bias is None:
        return
    if bias.shape != weight.shape[:-1]:
        raise ValueError(f"{op}: bias must have shape {list(weight.shape[:-1])}, got {list(bias.shape)}.")
    if bias.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{op}: bias must be one of {_names(ACTIVATION_DTYPES)}, got {_spelled(bias.dtype)}.")
    check_devices(op, weight, bias=bias)


def check_embedding(ids: Tensor, weight: Tensor, fmt: QuantFormat, dtype: torch.dtype) -> int:
    """Check all arguments of `embedding` except the values of ids, and return K."""
    columns = check_packed("embedding", weight, fmt, matrix=True)
    check_output_dtype("embedding", dtype)
    check_ids_type(ids, weight)
    check_size((*ids.shape, columns))
    return columns


def check_ids_type(ids: Tensor, weight: Tensor) -> None:
    """Check that the ids of `embedding` are integers on the weight's device."""
    if ids.dtype not in _IDS:
        raise ValueError(f"embedding: ids must be int64 or int32, got {_spelled(ids.dtype)}.")
    check_devices("embedding", weight, ids=ids)


def check_ids(ids: Tensor, weight: Tensor) -> None:
    """Check that the ids of `embedding` are integers on the weight's device, and in range.

    Raises:
        ValueError: wrong type or device.
        IndexError: an id is out of range.
    """
    check_ids_type(ids, weight)
    wide = ids.long()  # the number of rows may not fit into int32
    first = _first((wide < 0) | (wide >= weight.shape[0]))
    if first is not None:
        raise IndexError(
            f"embedding: ids[{_position(first, ids.shape)}] is {int(ids.reshape(-1)[first])}, "
            f"but the table has {weight.shape[0]} rows."
        )


def check_experts_shapes(x: Tensor, weight: Tensor, fmt: QuantFormat, ids: Tensor, bias: Tensor | None) -> None:
    """Check types, shapes and devices of the arguments of `experts_linear`, but not the values of ids."""
    op = "experts_linear"
    columns = _check_stack(op, "x", x, weight, fmt, ids)
    check_expert_rows(x, ids, columns, fmt.name)
    check_devices(op, weight, x=x, ids=ids)
    check_bias(op, bias, weight)
    check_size((*ids.shape, weight.shape[1]))


def _check_stack(op: str, name: str, rows: Tensor, weight: Tensor, fmt: QuantFormat, ids: Tensor) -> int:
    """Check the stack, the type of the rows that are multiplied (called `name`), and the type of ids. Returns K."""
    columns = check_packed(op, weight, fmt)
    if weight.ndim != 3:
        raise ValueError(f"{op}: the weight must have 3 dimensions [E, N, row_bytes], got shape {list(weight.shape)}.")
    if rows.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{op}: {name} must be one of {_names(ACTIVATION_DTYPES)}, got {_spelled(rows.dtype)}.")
    if ids.dtype not in _IDS or ids.ndim != 2:
        raise ValueError(f"{op}: ids must be int64 or int32 [T, S], got {_spelled(ids.dtype)} {list(ids.shape)}.")
    return columns


def check_experts_dx(dy: Tensor, weight: Tensor, fmt: QuantFormat, ids: Tensor) -> int:
    """Check everything about the arguments of `experts_linear_dx` except the values of ids.

    Returns:
        K.
    """
    op = "experts_linear_dx"
    columns = _check_stack(op, "dy", dy, weight, fmt, ids)
    wanted = [*ids.shape, weight.shape[1]]
    torch._check_value(
        list(dy.shape) == wanted,
        lambda: f"{op}: dy must be {wanted}, one row per slot, for these ids; got shape {list(dy.shape)}.",
    )
    check_devices(op, weight, dy=dy, ids=ids)
    check_size((*ids.shape, columns))
    return columns


def check_expert_ids(op: str, ids: Tensor, experts: int) -> None:
    """Check that ids are 0 .. E; E means an expert on another rank.

    Raises:
        IndexError: an id is out of range.
    """
    wide = ids.long()  # the number of experts may not fit into int32
    first = _first((wide < 0) | (wide > experts))
    if first is not None:
        raise IndexError(
            f"{op}: ids[{_position(first, ids.shape)}] is {int(ids.reshape(-1)[first])}, but the weight has {experts} experts, "
            f"0 to {experts - 1}. Give ids of these; {experts} marks an expert that another process holds, and adds zeros."
        )


def check_experts(x: Tensor, weight: Tensor, fmt: QuantFormat, ids: Tensor, bias: Tensor | None) -> None:
    """Check the arguments of `experts_linear`. Ids must be 0 .. E; E means an expert on another rank.

    Raises:
        ValueError: wrong types, shapes or devices.
        IndexError: an id is out of range.
    """
    check_experts_shapes(x, weight, fmt, ids, bias)
    check_expert_ids("experts_linear", ids, weight.shape[0])


def check_square_sums(x: Tensor, groups: Tensor | None, count: int) -> None:
    """Check the arguments of `square_sums`. Groups may be on another device; values out of range mean no group."""
    op = "square_sums"
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{op}: x must be one of {_names(ACTIVATION_DTYPES)}, got {_spelled(x.dtype)}.")
    if x.ndim < 1 or x.shape[-1] <= 0:
        raise ValueError(f"{op}: x must have columns, got shape {list(x.shape)}.")
    if count <= 0:
        raise ValueError(f"{op}: count must be positive, got {count}.")
    check_size((count, x.shape[-1]))
    if groups is None:
        return
    if groups.dtype not in _IDS:
        raise ValueError(f"{op}: groups must be int64 or int32, got {_spelled(groups.dtype)}.")
    rows = x.numel() // x.shape[-1]
    if groups.ndim != 2 or groups.shape[0] != rows:
        raise ValueError(f"{op}: groups must have shape [{rows}, slots], got {list(groups.shape)}.")
    if (groups.device.type == "meta") != (x.device.type == "meta"):
        raise ValueError(f"{op}: groups are on {groups.device}, x is on {x.device}. Move one of them.")


def check_expert_rows(x: Tensor, ids: Tensor, columns: int, format: str) -> None:
    """Check that x of `experts_linear` has one row of K values per token, or one per slot."""
    shared, own = [ids.shape[0], columns], [*ids.shape, columns]
    torch._check_value(
        list(x.shape) in (shared, own),
        lambda: (
            f"experts_linear: x must be {shared}, one row per token, or {own}, one per slot, for this {format} weight and these "
            f"ids; got shape {list(x.shape)}."
        ),
    )
