"""Encoders of `quantized_folders.py` for integer codes, written from the descriptions of the formats, word by word."""

from __future__ import annotations

import torch
from quantized_folders import Encoded, Encoder
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def quantized(
    weight: Tensor, bits: int, group: int, symmetric: bool, scale: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [N, K], scales and zeros [N, groups]) of a weight; codes and zeros are 0 .. 2**bits - 1."""
    rows, columns = weight.shape
    top = (1 << bits) - 1
    grouped = weight.reshape(rows, -1, min(group, columns))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        scales = (2 * torch.maximum(-low, high) / top).clamp(min=1e-4).to(scale).float()
        zeros = torch.full_like(scales, 1 << bits - 1)
    else:
        scales = ((high - low) / top).clamp(min=1e-4).to(scale).float()
        zeros = torch.round(-low / scales).clamp(1, top)
    codes = torch.round(grouped / scales[..., None] + zeros[..., None]).clamp(0, top)
    return codes.reshape(rows, columns).long(), scales, zeros.long()


def values(codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor) -> Tensor:
    """(q - zero) * scale, with the group of each column."""
    return (codes - zeros[:, group]).float() * scales[:, group]


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[n, count]` as int32 words `[n, ceil(count * bits / 32)]`, bit by bit."""
    rows, count = codes.shape
    out = torch.zeros(rows, -(-count * bits // 32), dtype=torch.int64)
    for i in range(count):
        for bit in range(bits):
            at = i * bits + bit
            out[:, at // 32] |= (codes[:, i] >> bit & 1) << at % 32
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int()


def compressed(bits: int, group: int, symmetric: bool = True, scale: torch.dtype = torch.bfloat16) -> Encoder:
    """compressed-tensors, "pack-quantized"; a group of 0 columns is the whole row."""

    def encode(name: str, weight: Tensor) -> Encoded:
        size = group or weight.shape[1]
        codes, scales, zeros = quantized(weight, bits, size, symmetric, scale)
        tensors = {
            f"{name}_packed": words(codes, bits),
            f"{name}_scale": scales.to(scale),
            f"{name}_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors[f"{name}_zero_point"] = words(zeros.t(), bits).t()
        return tensors, values(codes, scales, zeros, torch.arange(weight.shape[1]) // size)

    return encode


def compressed_bytes(name: str, weight: Tensor) -> Encoded:
    """compressed-tensors, "int-quantized", a scale for each row."""
    codes, scales, zeros = quantized(weight, 8, weight.shape[1], True)
    tensors = {name: (codes - 128).to(torch.int8), f"{name}_scale": scales.half()}
    return tensors, values(codes, scales, zeros, torch.zeros(weight.shape[1], dtype=torch.long))


def torchao_bytes(name: str, weight: Tensor) -> Encoded:
    """torchao, 4-bit codes in bytes, groups of 64."""
    codes, scales, zeros = quantized(weight, 4, 64, False)
    stem = name.removesuffix("weight")
    tensors = {
        f"{stem}_weight_qdata": (codes - 8).to(torch.int8),
        f"{stem}_weight_scale": scales,
        f"{stem}_weight_zero_point": (zeros - 8).to(torch.int8),
    }
    return tensors, values(codes, scales, zeros, torch.arange(weight.shape[1]) // 64)


def gptq(bits: int, group: int, *, act_order: bool = False, less_one: bool = True, index: bool = True) -> Encoder:
    """GPTQ; with `act_order`, the columns of a group lie anywhere."""

    def encode(name: str, weight: Tensor) -> Encoded:
        columns = weight.shape[1]
        where = torch.arange(columns) // group
        order = torch.randperm(columns) if act_order else torch.arange(columns)
        codes, scales, zeros = quantized(weight[:, order], bits, group, False)
        codes, where = codes[:, order.argsort()], where[order.argsort()]
        stem = name.removesuffix("weight")
        tensors = {
            f"{stem}qweight": words(codes, bits).t(),
            f"{stem}qzeros": words((zeros - int(less_one)).t(), bits),
            f"{stem}scales": scales.t().half(),
        }
        if index:
            tensors[f"{stem}g_idx"] = where.int()
        return tensors, values(codes, scales, zeros, where)

    return encode


def awq(group: int) -> Encoder:
    """AWQ, "gemm"."""

    def encode(name: str, weight: Tensor) -> Encoded:
        columns = weight.shape[1]
        codes, scales, zeros = quantized(weight, 4, group, False)
        stem = name.removesuffix("weight")

        def shuffled(matrix: Tensor) -> Tensor:
            """Words along the last dimension; place i of a word has column AWQ_ORDER[i] of its eight."""
            return words(matrix.reshape(matrix.shape[0], -1, 8)[..., AWQ_ORDER].flatten(1), 4)

        tensors = {
            f"{stem}qweight": shuffled(codes.t()),
            f"{stem}qzeros": shuffled(zeros.t()),
            f"{stem}scales": scales.t().half(),
        }
        return tensors, values(codes, scales, zeros, torch.arange(columns) // group)

    return encode
