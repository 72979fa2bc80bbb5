"""Folders in the layout of mlx-lm, written without isqtorch: codes, scales and biases are made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Setting = dict[str, Any]


def affine(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The three tensors of a weight, and the values that they mean."""
    *rows, columns = weight.shape
    groups = weight.float().reshape(*rows, columns // group, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scales, biases = ((high - low) / max(2**bits - 1, 1)).to(dtype), low.to(dtype)
    codes = ((groups - biases.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 2**bits - 1).long()
    meant = codes.float() * scales.float()[..., None] + biases.float()[..., None]
    ones = (codes[..., None] >> torch.arange(bits)) & 1  # bit i of code k is bit k * bits + i of the row
    words = (ones.reshape(*rows, -1, 32) << torch.arange(32)).sum(-1)
    packed = words.to(torch.uint32)
    return {"weight": packed, "scales": scales, "biases": biases}, meant.reshape(weight.shape)


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], **entries: Any) -> Path:
    """Write the files of a folder. `entries` are those of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in config.items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(kept | entries), encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "mlx"})
    return folder


def converted(
    model: Any,
    setting: Callable[[str], Setting | None],
    dtype: torch.dtype = torch.bfloat16,
    names: Callable[[str, Tensor], dict[str, Tensor]] = lambda name, tensor: {name: tensor},
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Convert the weights of a float model.

    Args:
        model: the model.
        setting: {"bits", "group_size"} for the path of a module in MLX; None: it stays float.
        dtype: the type of scales and biases.
        names: maps a tensor of the model to those of MLX.

    Returns:
        The tensors of the folder, and {name in MLX: float values that the folder means}.
    """
    tied = set(model.all_tied_weights_keys)
    tensors, meant = {}, {}
    for own, value in model.state_dict().items():
        for name, tensor in ({} if own in tied else names(own, value)).items():
            path = name.removesuffix(".weight")
            chosen = setting(path) if name.endswith(".weight") and tensor.dim() > 1 else None
            if chosen is None:
                tensors[name] = meant[name] = tensor
                continue
            parts, meant[name] = affine(tensor, chosen["bits"], chosen["group_size"], dtype)
            tensors |= {f"{path}.{leaf}": part for leaf, part in parts.items()}
    return tensors, meant
