"""Pack codes of a few bits into bytes, and unpack them: as a bit stream, or in planes.

Both directions are exact and work on any device. The leading dimension n counts blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Pack codes as MLX does: code k of a block takes bits [k * bits, (k + 1) * bits), least significant bit first.

    Eight consecutive codes fill `bits` whole bytes, so groups of eight codes never share a byte:

        bits = 3:  byte 0 = 22111000   byte 1 = 54443332   byte 2 = 77766655     (digit = number of the code)

    Args:
        codes: uint8 `[n, count]`, each below `2**bits`; count is a multiple of 8.
        bits: 1 to 8.

    Returns:
        uint8 `[n, count * bits / 8]`.
    """
    n, count = codes.shape
    eight = codes.reshape(n, count // 8, 8).to(torch.int64)
    word = torch.zeros_like(eight[..., 0])  # 8 * bits <= 64 bits
    for k in range(8):
        word |= eight[..., k] << (k * bits)
    octets = [(word >> (8 * i)) & 0xFF for i in range(bits)]
    return torch.stack(octets, dim=-1).to(torch.uint8).reshape(n, count // 8 * bits)


def unpack_stream(stream: Tensor, bits: int) -> Tensor:
    """Invert `pack_stream`: uint8 `[n, count * bits / 8]` -> uint8 `[n, count]`."""
    n, nbytes = stream.shape
    octets = stream.reshape(n, nbytes // bits, bits).to(torch.int64)
    word = torch.zeros_like(octets[..., 0])
    for i in range(bits):
        word |= octets[..., i] << (8 * i)
    eight = [(word >> (k * bits)) & ((1 << bits) - 1) for k in range(8)]
    return torch.stack(eight, dim=-1).to(torch.uint8).reshape(n, nbytes // bits * 8)


def pack_planes(codes: Tensor, bits: int, width: int) -> Tensor:
    """Pack codes as ggml does: plane p of a chunk holds `width` consecutive codes at bit `p * bits` of its bytes.

        bits = 4, width = 32:  byte l of chunk c = code 64c + l (low nibble) | code 64c + 32 + l (high nibble)

    Args:
        codes: uint8 `[n, count]`, each below `2**bits`; count is a multiple of `width * 8 / bits`.
        bits: 1, 2 or 4.
        width: bytes in a chunk.

    Returns:
        uint8 `[n, count * bits / 8]`.
    """
    n, count = codes.shape
    planes = codes.reshape(n, count * bits // (8 * width), 8 // bits, width)
    chunks = torch.zeros_like(planes[:, :, 0])
    for p in range(8 // bits):
        chunks |= planes[:, :, p] << (p * bits)
    return chunks.reshape(n, count * bits // 8)


def unpack_planes(packed: Tensor, bits: int, width: int) -> Tensor:
    """Invert `pack_planes`: uint8 `[n, count * bits / 8]` -> uint8 `[n, count]`."""
    n, nbytes = packed.shape
    chunks = packed.reshape(n, nbytes // width, width)
    planes = [(chunks >> (p * bits)) & ((1 << bits) - 1) for p in range(8 // bits)]
    return torch.stack(planes, dim=2).reshape(n, nbytes * 8 // bits)
