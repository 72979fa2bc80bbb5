"""The types that tensors have in GGUF files: number, name, size, the format with the same bytes, and how to decode them.

Source: the enum ggml_type and the type traits of ggml. Numbers that ggml has given up are absent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import get_format
from .gguf_decode import DECODERS


@dataclass(frozen=True)
class GgufType:
    """One type of the elements of a tensor in a GGUF file.

    Attributes:
        number: the number that stands for the type in the directory of the file.
        name: ggml's name.
        block: weights per block; 1 for plain numbers.
        block_bytes: bytes per block.
        format: name of the format with the same bytes; None for plain numbers, and for types that can only be decoded.
        label: general.file_type of a file that has mostly this type: programs show it. None: not written here.
    """

    number: int
    name: str
    block: int
    block_bytes: int
    format: str | None = None
    label: int | None = None


_ROWS = (
    GgufType(0, "F32", 1, 4),
    GgufType(1, "F16", 1, 2),
    GgufType(2, "Q4_0", 32, 18, "q4_0", 2),
    GgufType(3, "Q4_1", 32, 20, "q4_1", 3),
    GgufType(6, "Q5_0", 32, 22, "q5_0", 8),
    GgufType(7, "Q5_1", 32, 24, "q5_1", 9),
    GgufType(8, "Q8_0", 32, 34, "q8_0", 7),
    GgufType(9, "Q8_1", 32, 36, "q8_1"),
    *(  # of 2 to 6 bits
        GgufType(8 + bits, f"Q{bits}_K", 256, size, f"q{bits}k", label)
        for bits, size, label in ((2, 84, 10), (3, 110, 11), (4, 144, 14), (5, 176, 16), (6, 210, 18))
    ),
    GgufType(15, "Q8_K", 256, 292, "q8k"),
    GgufType(16, "IQ2_XXS", 256, 66),
    GgufType(17, "IQ2_XS", 256, 74),
    GgufType(18, "IQ3_XXS", 256, 98),
    GgufType(19, "IQ1_S", 256, 50),
    GgufType(20, "IQ4_NL", 32, 18, "iq4_nl", 25),
    GgufType(21, "IQ3_S", 256, 110),
    GgufType(22, "IQ2_S", 256, 82),
    GgufType(23, "IQ4_XS", 256, 136, "iq4_xs", 30),
    GgufType(24, "I8", 1, 1),
    GgufType(25, "I16", 1, 2),
    GgufType(26, "I32", 1, 4),
    GgufType(27, "I64", 1, 8),
    GgufType(28, "F64", 1, 8),
    GgufType(29, "IQ1_M", 256, 56),
    GgufType(30, "BF16", 1, 2),
    GgufType(34, "TQ1_0", 256, 54),
    GgufType(35, "TQ2_0", 256, 66),
    GgufType(39, "MXFP4", 32, 17, "mxfp4", 38),
    GgufType(40, "NVFP4", 64, 36),
)

GGUF_TYPES = {row.number: row for row in _ROWS}
"""Number in the file -> type."""

_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_CHUNK = 1 << 20  # weights decoded at a time


def decode(number: int, data: Tensor) -> Tensor:
    """Decode the bytes of a tensor, whatever its type. The result has the bits that ggml computes.

    Args:
        number: of the type, as in the directory of the file.
        data: uint8 `[..., row_bytes]` on the CPU; rows are whole blocks.

    Returns:
        f32 `[..., columns]`.

    Raises:
        ValueError: `number` is no type, or `data` is not uint8 on the CPU, or its rows are not whole blocks.

    Example:
        weight = decode(2, torch.zeros(8, 36, dtype=torch.uint8))  # Q4_0
        print(weight.shape)  # torch.Size([8, 64])
    """
    kind = GGUF_TYPES.get(number)
    if kind is None:
        known = ", ".join(f"{row.number} {row.name}" for row in _ROWS)
        raise ValueError(f"decode: {number} is no type of tensors in GGUF files. Types: {known}.")
    if data.dtype != torch.uint8 or data.device.type != "cpu" or not data.dim() or data.shape[-1] % kind.block_bytes:
        raise ValueError(
            f"decode: expected uint8 rows on the CPU whose size is a multiple of {kind.block_bytes} bytes ({kind.name}), got "
            f"{data.dtype} {list(data.shape)} on {data.device}."
        )
    blocks = data.reshape(data.numel() // kind.block_bytes, kind.block_bytes)
    out = torch.empty(len(blocks), kind.block)
    step = _CHUNK // kind.block
    for first in range(0, len(blocks), step):
        out[first : first + step] = _decode_blocks(kind, blocks[first : first + step])
    return out.view(*data.shape[:-1], data.shape[-1] // kind.block_bytes * kind.block)


def _decode_blocks(kind: GgufType, blocks: Tensor) -> Tensor:
    """uint8 `[n, block_bytes]` -> f32 `[n, block]`."""
    if kind.name in _PLAIN:
        return blocks.clone(memory_format=torch.contiguous_format).view(_PLAIN[kind.name]).float()
    if kind.format is None:
        return DECODERS[kind.name](blocks)
    fmt = get_format(kind.format)
    return fmt.decode(fmt.unpack(blocks))
