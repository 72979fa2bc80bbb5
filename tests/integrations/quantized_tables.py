"""Encoders of `quantized_folders.py` for bitsandbytes, hqq, and NVFP4 of two programs."""

from __future__ import annotations

import json

import torch
from quantized_folders import E2M1, Encoded, Encoder, nearest
from quantized_integers import quantized
from torch import Tensor

TABLE = torch.linspace(-1, 1, 16) ** 3  # any 16 numbers: readers must take the table that is stored


def bnb4(kind: str, nested: bool = False) -> Encoder:
    """4-bit codes of a table, runs of 64 weights."""

    def encode(name: str, weight: Tensor) -> Encoded:
        runs = weight.reshape(-1, 64)
        absmax = runs.abs().amax(1)
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors = {f"{name}.quant_map": TABLE}
        if nested:
            inner = torch.linspace(-1, 1, 256)
            offset = float(absmax.mean())
            outer = torch.stack([each.abs().amax() for each in (absmax - offset).split(256)])
            spread = outer.repeat_interleave(256)[: len(absmax)]
            codes = nearest((absmax - offset) / spread, inner)
            absmax = inner[codes] * spread + offset
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors |= {f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": inner}
            tensors[f"{name}.absmax"] = codes.to(torch.uint8)
        else:
            tensors[f"{name}.absmax"] = absmax
        codes = nearest(runs / absmax[:, None], TABLE)
        flat = codes.flatten()
        tensors[name] = (flat[0::2] << 4 | flat[1::2]).to(torch.uint8)[:, None]
        tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
        return tensors, (TABLE[codes] * absmax[:, None]).reshape(weight.shape)

    return encode


def bnb8(name: str, weight: Tensor) -> Encoded:
    """int8 with the largest absolute value of each row."""
    largest = weight.abs().amax(1)
    codes = torch.round(weight / largest[:, None] * 127).to(torch.int8)
    stem = name.removesuffix("weight")
    tensors = {name: codes, f"{stem}SCB": largest, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * largest[:, None] * (1 / 127)


def hqq(bits: int, group: int, axis: int = 1, as_float: bool = False, scale: torch.dtype = torch.float16) -> Encoder:
    """hqq; groups along the columns (axis 1), or spread over the weight (axis 0)."""

    def encode(name: str, weight: Tensor) -> Encoded:
        grouped = weight.reshape(-1, group) if axis == 1 else weight.reshape(group, -1).t()
        codes, scales, zeros = quantized(grouped, bits, group, False, scale)
        halves = (zeros.float() + 0.25).to(scale)  # no integers
        values = (codes.float() - halves.float()) * scales
        if axis == 0:
            codes, scales, halves, values = codes.t(), scales.t(), halves.t(), values.t()
        each, top = {8: (1, 0), 4: (2, 4), 3: (10, 27), 2: (4, 6)}[bits]
        padded = torch.zeros(-(-len(codes) // each) * each, codes.shape[1], dtype=torch.int64)
        padded[: len(codes)] = codes
        packed = sum(part << top - i * bits for i, part in enumerate(padded.chunk(each)))
        assert isinstance(packed, Tensor)
        words = packed.to(torch.int32 if bits == 3 else torch.uint8)
        packing = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}[bits]
        stem = name.removesuffix("weight")
        tensors = {
            "W_q": words.contiguous().view(torch.float16) if as_float else words,
            "scale": scales.to(scale),
            "zero": halves,
            "shape": torch.tensor(weight.shape),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "packing": torch.tensor(list(packing.encode()), dtype=torch.uint8),
            "view_as_float": torch.tensor(as_float, dtype=torch.uint8),
            "quant_scale": torch.tensor(0, dtype=torch.uint8),
            "quant_zero": torch.tensor(0, dtype=torch.uint8),
            "compute_dtype": torch.tensor(list(b"torch.float16"), dtype=torch.uint8),
        }
        return {f"{stem}{leaf}": tensor for leaf, tensor in tensors.items()}, values.reshape(weight.shape)

    return encode


def nvfp4(*, divides: bool) -> Encoder:
    """E2M1 in groups of 16; the second scale divides (compressed-tensors) or multiplies (ModelOpt)."""

    def encode(name: str, weight: Tensor) -> Encoded:
        groups = weight.reshape(weight.shape[0], -1, 16)
        outer = torch.tensor(448 * 6 / float(weight.abs().max()))
        outer = outer if divides else 1 / outer
        wanted = groups.abs().amax(-1) / 6
        stored = (wanted * outer if divides else wanted / outer).to(torch.float8_e4m3fn)
        scales = stored.float() / outer if divides else stored.float() * outer
        codes = nearest(groups / scales[..., None], E2M1)
        values = (E2M1[codes] * scales[..., None]).reshape(weight.shape)
        codes = codes.reshape(weight.shape)
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
        stem = name.removesuffix("weight")
        if divides:
            return {f"{name}_packed": packed, f"{name}_scale": stored, f"{name}_global_scale": outer.reshape(1)}, values
        extra = {f"{stem}input_scale": torch.ones(())}
        return {name: packed, f"{name}_scale": stored, f"{name}_scale_2": outer, **extra}, values

    return encode
