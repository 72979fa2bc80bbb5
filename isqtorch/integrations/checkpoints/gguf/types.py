"""The types of tensors: which format has the same bytes, and what is done with a type that no format has."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isqtorch.formats import QuantFormat, formats, get_format
from isqtorch.formats.gguf_types import GGUF_TYPES

SIZES = {number: (row.block, row.block_bytes) for number, row in GGUF_TYPES.items()}
"""Type -> (elements of a block, bytes of a block), as the reader wants them."""

_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_ROWS_AT_ONCE = 1 << 22  # elements decoded at a time

# What weights of a type without a format are packed in. Their values are few, so the error of packing them again is small
# even with few bits more; the numbers are in the documentation of `isqtorch.load`.
_INSTEAD = {
    "TQ1_0": "q3k",
    "TQ2_0": "q3k",
    "IQ1_S": "q4k",
    "IQ1_M": "q4k",
    "IQ2_XXS": "q4k",
    "IQ2_XS": "q4k",
    "IQ2_S": "q4k",
    "IQ3_XXS": "q5k",
    "IQ3_S": "q5k",
    "IQ4_NL": "q5_0",
    "IQ4_XS": "q5k",
    "MXFP4": "q5_0",
    "NVFP4": "q5_0",
}


def type_name(number: int) -> str:
    """ggml's name of a type."""
    return GGUF_TYPES[number].name


def is_float(number: int) -> bool:
    """Whether a tensor of this type has plain numbers."""
    return number in _FLOATS


def format_of(number: int) -> QuantFormat | None:
    """The format with the same bytes; None if there is none."""
    name = GGUF_TYPES[number].format
    return get_format(name) if name is not None and name in formats() else None


def instead_of(number: int) -> QuantFormat:
    """The format in which to pack the values of a quantized type that no format has."""
    return get_format(_INSTEAD[type_name(number)])


def decoded(rows: NDArray[np.uint8], number: int, where: str) -> Tensor:
    """The values of rows of a tensor.

    Args:
        rows: uint8 `[n, row_bytes]`.
        number: the type.
        where: the file and tensor, for messages.

    Returns:
        `[n, columns]`: the type of the file for plain numbers, else f32.

    Raises:
        ValueError: the type has no weights: integers.
    """
    data = torch.from_numpy(rows)
    if number in _FLOATS:
        return data.view(_FLOATS[number])
    fmt = format_of(number)
    if fmt is not None:
        return torch.ops.isqtorch.dequantize(data, fmt.name, torch.float32)  # type: ignore[no-any-return]
    raise ValueError(f"load: {where}: tensors of type {type_name(number)} cannot be decoded here")
