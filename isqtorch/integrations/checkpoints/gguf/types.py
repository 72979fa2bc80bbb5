"""The types of tensors: which format has the same bytes, and what is done with a type that no format has."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isqtorch.formats import QuantFormat, formats, get_format, repacked_as
from isqtorch.formats.gguf_types import GGUF_TYPES, decode

SIZES = {number: (row.block, row.block_bytes) for number, row in GGUF_TYPES.items()}
"""Type -> (elements of a block, bytes of a block), as the reader wants them."""

_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_INTEGERS = frozenset({24, 25, 26, 27})

_NARROW = "q8_0"  # for rows that are no whole blocks of the format


def type_name(number: int) -> str:
    """ggml's name of a type."""
    return GGUF_TYPES[number].name


def is_plain(number: int) -> bool:
    """Whether a tensor of this type has plain numbers: floats, or integers, which are no weights."""
    return number in _FLOATS or number in _INTEGERS


def format_of(number: int) -> QuantFormat | None:
    """The format with the same bytes; None if there is none."""
    name = GGUF_TYPES[number].format
    return get_format(name) if name is not None and name in formats() else None


def instead_of(number: int, columns: int) -> QuantFormat:
    """The format in which to pack the values of a quantized type that no format has."""
    row = GGUF_TYPES[number]
    fmt = repacked_as(8 * row.block_bytes / row.block)
    return fmt if columns % fmt.block == 0 else get_format(_NARROW)


def decoded(rows: NDArray[np.uint8], number: int, where: str) -> Tensor:
    """The values of rows of a tensor.

    Args:
        rows: uint8 `[n, row_bytes]`.
        number: the type.
        where: the file and tensor, for messages.

    Returns:
        `[n, columns]`: the type of the file for plain numbers, else f32.

    Raises:
        ValueError: the tensor has integers.
    """
    data = torch.from_numpy(rows)
    if number in _FLOATS:
        return data.view(_FLOATS[number])
    if number in _INTEGERS:
        raise ValueError(
            f"load: {where} has integers ({type_name(number)}), which are no weights. The file is damaged."
        )
    fmt = format_of(number)
    if fmt is not None:
        return torch.ops.isqtorch.dequantize(data, fmt.name, torch.float32)  # type: ignore[no-any-return]
    return decode(number, data)
