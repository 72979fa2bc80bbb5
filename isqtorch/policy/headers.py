"""The inventory of a checkpoint, from the tensor names and shapes in its headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from isqtorch.files.checkpoints import Headers
from isqtorch.files.tensors import DTYPES

from .inventory import Inventory
from .layers import LayerInfo, embedding_by_name, head_by_name

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # these store c_* transposed
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
_NUMBERED_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(\w+)\.weight$")
_EXPERT_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")  # names of fused experts in transformers
_EXPERTS = {"experts", "shared_experts"}
_STACKED_LAYERS = ("input_linear", "output_linear")  # their names in JetMoe and in Granite checkpoints


def describe_headers(headers: Headers, config: Mapping[str, Any]) -> tuple[Inventory, list[str]]:
    """The inventory of a checkpoint from its headers, and notes for the report."""
    layers, rest_bytes, rest_numel = [], 0, 0
    if "model_type" in config:
        headers = _fused(headers)
    for name, (dtype_name, shape) in headers.items():
        if dtype_name not in DTYPES:
            raise ValueError(f"plan: tensor {name} has the unknown type {dtype_name}")
        dtype = DTYPES[dtype_name]
        if len(shape) >= 2:
            layers.append(_describe(name, dtype, shape, config))
        else:
            numel = shape[0] if shape else 1
            rest_numel += numel
            rest_bytes += numel * dtype.itemsize
    layers, notes = _tie_head(layers, config)
    return Inventory(layers, rest_bytes, rest_numel), notes


def _describe(name: str, dtype: torch.dtype, shape: tuple[int, ...], config: Mapping[str, Any]) -> LayerInfo:
    path = name.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    if len(shape) == 3 and ((leaf in _STACKS and _EXPERTS & set(parent.split("."))) or leaf in _STACKED_LAYERS):
        return LayerInfo(path, "experts", _upright(leaf, shape, config), dtype, block=parent)
    if len(shape) != 2 or path == name:
        reason = "not the weight of a linear layer or embedding"
        if path != name:
            reason = "convolutions are never quantized"
        return LayerInfo(path, "other", shape, dtype, keep=reason)
    if embedding_by_name(leaf):
        return LayerInfo(path, "embedding", shape, dtype, "embedding")
    if config.get("model_type") in _CONV1D_MODELS and leaf in _CONV1D_LAYERS:
        shape = shape[::-1]
    return LayerInfo(path, "linear", shape, dtype, "head" if head_by_name(path) else "")


def _fused(headers: Headers) -> Headers:
    """The headers of the tensors after loading: transformers joins the matrices of numbered experts into stacks."""
    experts: dict[str, dict[str, list[tuple[str, tuple[int, ...]]]]] = {}  # path of the list -> part -> its matrices
    for name, header in headers.items():
        match = _NUMBERED_EXPERT.match(name)
        if match and match[3] in _EXPERT_PARTS and len(header[1]) == 2:
            experts.setdefault(match[1], {}).setdefault(_EXPERT_PARTS[match[3]], []).append(header)
    stacks = {path: _stacks(parts) for path, parts in experts.items()}
    out: Headers = {}
    for name, header in headers.items():
        match = _NUMBERED_EXPERT.match(name)
        if match and stacks.get(match[1]) and match[3] in _EXPERT_PARTS:
            out.update({f"{match[1]}.{leaf}": stack for leaf, stack in stacks[match[1]].items()})
        else:
            out[name] = header
    return out


def _stacks(parts: Mapping[str, list[tuple[str, tuple[int, ...]]]]) -> Headers:
    """{name of a stack: its header} of a list of experts; empty if the experts differ in shape or dtype."""
    if not {"up", "down"} <= set(parts) or len({len(matrices) for matrices in parts.values()}) != 1:
        return {}
    if any(len(set(matrices)) != 1 for matrices in parts.values()):
        return {}
    count = len(parts["up"])
    (dtype, (rows, columns)), (down_dtype, down) = parts["up"][0], parts["down"][0]
    if "gate" in parts:
        if parts["gate"][0] != parts["up"][0]:
            return {}
        rows *= 2
    up_name = "gate_up_proj" if "gate" in parts else "up_proj"
    return {up_name: (dtype, (count, rows, columns)), "down_proj": (down_dtype, (count, *down))}


def _upright(leaf: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape [E, N, K] of a stack that may be stored as [E, K, N]; the model's hidden size tells the axes apart."""
    text = config.get("text_config")
    hidden = config.get("hidden_size", text.get("hidden_size") if isinstance(text, Mapping) else None)
    experts, rows, columns = shape
    wide, other = (rows, columns) if leaf in ("down_proj", "output_linear") else (columns, rows)
    return (experts, columns, rows) if wide != hidden and other == hidden else shape


def _tie_head(layers: list[LayerInfo], config: Mapping[str, Any]) -> tuple[list[LayerInfo], list[str]]:
    """Apply `tie_word_embeddings`: the head shares the weight of the embedding, even if the file stores it twice."""
    text = config.get("text_config")
    if not (config.get("tie_word_embeddings") or (isinstance(text, Mapping) and text.get("tie_word_embeddings"))):
        return layers, []
    tables = [layer for layer in layers if layer.kind == "embedding"]
    if tables and not any(layer.role == "head" for layer in layers):
        largest = max(tables, key=lambda layer: layer.numel)
        return layers, [f"the output head is tied to {largest.name} (tie_word_embeddings) and shares its bytes"]
    by_shape = {table.shape: table.name for table in tables}
    return [
        replace(layer, tied_to=by_shape[layer.shape]) if layer.role == "head" and layer.shape in by_shape else layer
        for layer in layers
    ], []
