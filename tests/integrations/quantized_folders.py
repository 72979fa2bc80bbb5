"""Checkpoints as other programs quantize them, made of tiny models, and the same weights in floats.

An encoder takes a name and a weight `[N, K]` or `[E, N, K]`. It returns the tensors of the weight, as on the Hub, and the
values that they mean: computed with plain loops or broadcasts from the numbers that the encoder has chosen, not read
back from the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Encoded = tuple[dict[str, Tensor], Tensor]
Encoder = Callable[[str, Tensor], Encoded]


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def fp8(weight: Tensor, down: int, right: int, scale: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, values) of a matrix in blocks of `down` x `right`; the last blocks may be smaller."""
    rows, columns = weight.shape
    scales = torch.zeros(-(-rows // down), -(-columns // right))
    codes, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * down, (i + 1) * down), slice(j * right, (j + 1) * right)
            scales[i, j] = (weight[part].abs().max() / 448).to(scale).float()
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            values[part] = codes[part].float() * scales[i, j]
    return codes, scales.to(scale), values


def fp8_block(down: int = 128, right: int = 128, suffix: str = "_scale_inv") -> Encoder:
    def encode(name: str, weight: Tensor) -> Encoded:
        parts = [fp8(matrix, down, right) for matrix in (weight if weight.dim() == 3 else weight[None])]
        codes, scales, values = (torch.stack(each) for each in zip(*parts, strict=True))
        if weight.dim() == 2:
            codes, scales, values = codes[0], scales[0], values[0]
        return {name: codes, f"{name}{suffix}": scales}, values

    return encode


def fp8_rows(name: str, weight: Tensor) -> Encoded:
    codes, scales, values = fp8(weight, 1, weight.shape[1], torch.bfloat16)
    stem = name.removesuffix("weight")
    return {name: codes, f"{name}_scale": scales, f"{stem}input_scale_ub": torch.ones(1)}, values


def fp8_one(name: str, weight: Tensor) -> Encoded:
    codes, scales, values = fp8(weight, *weight.shape)
    stem = name.removesuffix("weight")
    return {name: codes, f"{name}_scale": scales.reshape(()), f"{stem}input_scale": torch.ones(())}, values


# ---- 4-bit floating point --------------------------------------------------------------------------------------------

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Numbers of the nearest levels."""
    return (values[..., None] - levels).abs().argmin(-1)


def mxfp4(name: str, weight: Tensor) -> Encoded:
    """A stack `[E, N, K]`; the values are those of a checkpoint of floats, `[E, K, N]`."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    steps = torch.exp2(exponents)[..., None]
    codes = nearest(groups / steps, E2M1)
    values = (E2M1[codes] * steps).reshape(weight.shape)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    tensors = {f"{name}_blocks": packed, f"{name}_scales": (exponents + 127).to(torch.uint8)}
    return tensors, values.transpose(1, 2).contiguous()


# ---- folders ---------------------------------------------------------------------------------------------------------


def write(
    model: Any, folder: Path, entry: dict[str, Any], encode: Encoder, chosen: Callable[[str, Tensor], bool]
) -> tuple[Path, Path]:
    """Write a model quantized and in floats.

    Args:
        model: a model in bf16.
        folder: an empty folder.
        entry: the quantization_config.
        encode: makes the tensors of a weight.
        chosen: (name, tensor) -> whether it is quantized.

    Returns:
        The folder with quantized weights, and the folder with the same values in float32.
    """
    quantized, floats = folder / "quantized", folder / "floats"
    model.save_pretrained(floats)
    stored, values = {}, {}
    for name, tensor in load_file(floats / "model.safetensors").items():
        if chosen(name, tensor):
            upright = tensor.transpose(1, 2) if entry["quant_method"] == "mxfp4" else tensor
            parts, values[name] = encode(name, upright.float().contiguous())
            stored |= {key: part.contiguous().clone() for key, part in parts.items()}
        else:
            stored[name] = values[name] = tensor
    quantized.mkdir()
    save_file(values, floats / "model.safetensors", {"format": "pt"})
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    config = json.loads((floats / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    return quantized, floats


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def packed(folder: Path, isq: Any, **options: Any) -> Any:
    """The model of a folder, packed while it is loaded; all its weights are found, and no others are there."""
    from transformers import AutoModelForCausalLM

    import isqtorch

    config = isqtorch.IsqConfig(isq, **options)
    model, info = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, output_loading_info=True)
    assert not any(info.values()), info
    return model


def same(one: Any, other: Any) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
