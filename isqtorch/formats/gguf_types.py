"""The types that tensors have in GGUF files: number, name, size, and which format of this package has the same bytes.

Source: the enum ggml_type and the type traits of ggml. Numbers that ggml has given up are absent.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufType:
    """One type of the elements of a tensor in a GGUF file.

    Attributes:
        number: the number that stands for the type in the directory of the file.
        name: ggml's name.
        block: weights per block; 1 for plain numbers.
        block_bytes: bytes per block.
        format: name of the format with the same bytes; None for plain numbers, and for types that can only be decoded.
    """

    number: int
    name: str
    block: int
    block_bytes: int
    format: str | None = None


_ROWS = (
    GgufType(0, "F32", 1, 4),
    GgufType(1, "F16", 1, 2),
    GgufType(2, "Q4_0", 32, 18, "q4_0"),
    GgufType(3, "Q4_1", 32, 20, "q4_1"),
    GgufType(6, "Q5_0", 32, 22, "q5_0"),
    GgufType(7, "Q5_1", 32, 24, "q5_1"),
    GgufType(8, "Q8_0", 32, 34, "q8_0"),
    GgufType(9, "Q8_1", 32, 36, "q8_1"),
    GgufType(10, "Q2_K", 256, 84, "q2k"),
    GgufType(11, "Q3_K", 256, 110, "q3k"),
    GgufType(12, "Q4_K", 256, 144, "q4k"),
    GgufType(13, "Q5_K", 256, 176, "q5k"),
    GgufType(14, "Q6_K", 256, 210, "q6k"),
    GgufType(15, "Q8_K", 256, 292, "q8k"),
    GgufType(16, "IQ2_XXS", 256, 66),
    GgufType(17, "IQ2_XS", 256, 74),
    GgufType(18, "IQ3_XXS", 256, 98),
    GgufType(19, "IQ1_S", 256, 50),
    GgufType(20, "IQ4_NL", 32, 18, "iq4_nl"),
    GgufType(21, "IQ3_S", 256, 110),
    GgufType(22, "IQ2_S", 256, 82),
    GgufType(23, "IQ4_XS", 256, 136, "iq4_xs"),
    GgufType(24, "I8", 1, 1),
    GgufType(25, "I16", 1, 2),
    GgufType(26, "I32", 1, 4),
    GgufType(27, "I64", 1, 8),
    GgufType(28, "F64", 1, 8),
    GgufType(29, "IQ1_M", 256, 56),
    GgufType(30, "BF16", 1, 2),
    GgufType(34, "TQ1_0", 256, 54),
    GgufType(35, "TQ2_0", 256, 66),
    GgufType(39, "MXFP4", 32, 17, "mxfp4"),
    GgufType(40, "NVFP4", 64, 36),
)

GGUF_TYPES = {row.number: row for row in _ROWS}
"""Number in the file -> type."""
