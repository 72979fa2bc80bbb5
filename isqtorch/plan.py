"""plan: what quantize_ would do, without reading a weight.

For a live model (also on the meta device) the answer is exact. For a checkpoint only names and shapes are known: rules that
look at a module's class cannot apply there, and layers are told apart by what models usually call them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .activations import check_activations
from .inventory import Inventory, inspect_model
from .policy import LayerInfo, Request, decide, head_by_name
from .prepare import check_model, parsed_device
from .report import QuantReport
from .topology import Spec, TopologyLike

Headers = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors dtype, shape)."""

MAX_JSON_BYTES = 1 << 26  # the index of the largest models is a few MB

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "U64": torch.uint64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_EMBEDDING = re.compile(
    r"(?:^|_)(?:embed|embeddings?)(?:_(?:tokens?|in|positions?|tokens_per_layer))?$"
    r"|^(?:wte|wpe|wtte|shared|relative_attention_bias)$"
)
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # these store c_* transposed
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")
_NUMBERED_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(\w+)\.weight$")
_EXPERT_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_STACKS = ("gate_up_proj", "up_proj", "down_proj")  # as transformers calls fused experts
_STACKED_LAYERS = ("input_linear", "output_linear")  # as JetMoe and the files of Granite call them


def plan(
    model: nn.Module | str | os.PathLike[str],
    fmt: Spec | None,
    *,
    topology: TopologyLike | None = None,
    organization: str = "default",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    fallback: str = "up",
    device: torch.device | str | None = None,
    activations: str | None = None,
) -> QuantReport:
    """Foresee the report of `quantize_`: formats, sizes, promotions, fallbacks and what is left, with reasons.

    Args:
        model: a live model; a folder with safetensors files and, for a transformers model, its config.json; one
            .safetensors file; or a model id on the Hugging Face Hub, whose headers are fetched.
        fmt: see `quantize_`, like the other options.
        device: where the model would end up, which decides what a number of bits means.

    Returns:
        A report with `planned=True`.

    Raises:
        ValueError: a bad option, or a damaged or already quantized checkpoint.
        OSError: no such file or folder, or the Hub cannot be reached or does not have it.
    """
    request = Request(fmt, topology, organization, include, exclude, fallback, "plan", activations=activations)
    notes: list[str] = []
    if isinstance(model, nn.Module):
        check_model(model, "plan")
        inventory = inspect_model(model)
    else:
        inventory, notes, _ = read_checkpoint(model)
    if device is not None:
        kind = parsed_device(device, "plan: device").type
        inventory = replace(inventory, layers=[replace(layer, device_type=kind) for layer in inventory.layers])
    verdict = decide(inventory.layers, request)
    report = QuantReport.build(inventory, verdict, fmt, planned=True)
    report.notes += [*notes, *check_activations(inventory.layers, verdict, request)]
    return report


def read_checkpoint(source: str | os.PathLike[str]) -> tuple[Inventory, list[str], Mapping[str, Any]]:
    """What a checkpoint holds, notes for the report, and its config.json; errors as those of `plan`."""
    headers, config = _headers(source)
    stored = config.get("quantization_config")
    if stored:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        by = "isqtorch" if method == "isq" else method
        raise ValueError(f"{source}: is quantized by {by} already; plan takes the original model")
    return *describe_headers(headers, config), config


def describe_headers(headers: Headers, config: Mapping[str, Any]) -> tuple[Inventory, list[str]]:
    """The inventory of a checkpoint, by names and shapes, and notes for the report."""
    layers, rest_bytes, rest_numel = [], 0, 0
    if "model_type" in config:
        headers = _fused(headers)
    for name, (dtype_name, shape) in headers.items():
        if dtype_name not in _DTYPES:
            raise ValueError(f"plan: tensor {name} has the unknown type {dtype_name}")
        dtype = _DTYPES[dtype_name]
        if len(shape) >= 2:
            layers.append(_describe(name, dtype, shape, config))
        else:
            numel = shape[0] if shape else 1
            rest_numel += numel
            rest_bytes += numel * dtype.itemsize
    notes = ["planned from names and shapes alone; rules that need the model's classes do not apply"]
    layers, tie_note = _tie_head(layers, config)
    return Inventory(layers, rest_bytes, rest_numel), notes + tie_note


def _describe(name: str, dtype: torch.dtype, shape: tuple[int, ...], config: Mapping[str, Any]) -> LayerInfo:
    path = name.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    if len(shape) == 3 and ((leaf in _STACKS and "experts" in parent.split(".")) or leaf in _STACKED_LAYERS):
        return LayerInfo(path, "experts", _upright(leaf, shape, config), dtype, block=parent)
    if len(shape) != 2 or path == name:
        reason = "not the weight of a linear layer or embedding"
        if path != name:
            reason = "convolutions are never quantized"
        return LayerInfo(path, "other", shape, dtype, keep=reason)
    if _EMBEDDING.search(leaf):
        return LayerInfo(path, "embedding", shape, dtype, "embedding")
    if config.get("model_type") in _CONV1D_MODELS and leaf in _CONV1D_LAYERS:
        shape = shape[::-1]
    return LayerInfo(path, "linear", shape, dtype, "head" if head_by_name(path) else "")


def _fused(headers: Headers) -> Headers:
    """The tensors as transformers holds them: it joins the matrices of numbered experts when it loads a model."""
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
    """{name of a stack: header} of a list of experts; empty where they are not alike."""
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
    """[E, N, K] of experts that may be stored as [E, K, N]: what goes in is as wide as the model, or what comes out."""
    text = config.get("text_config")
    hidden = config.get("hidden_size", text.get("hidden_size") if isinstance(text, Mapping) else None)
    experts, rows, columns = shape
    wide, other = (rows, columns) if leaf in ("down_proj", "output_linear") else (columns, rows)
    return (experts, columns, rows) if wide != hidden and other == hidden else shape


def _tie_head(layers: list[LayerInfo], config: Mapping[str, Any]) -> tuple[list[LayerInfo], list[str]]:
    """Apply `tie_word_embeddings`: the head is the embedding, whether the file holds it twice or once."""
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


# ---- where headers come from -----------------------------------------------------------------------------------------


def _headers(source: str | os.PathLike[str]) -> tuple[Headers, Mapping[str, Any]]:
    """(headers, config) of a folder, a file, or a model id."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"plan: model must be an nn.Module, a path or a model id, got {type(source).__name__}")
    path = Path(source).expanduser()
    if path.is_dir():
        config_path = path / "config.json"
        return _folder_headers(path), read_json(config_path) if config_path.is_file() else {}
    if path.is_file():
        return _file_headers(path), {}
    text = os.fspath(source)
    if (
        isinstance(source, os.PathLike)
        or text.startswith((".", "/", "~"))
        or text.count("/") != 1
        or text.endswith(".safetensors")
    ):
        raise FileNotFoundError(f"plan: {text!r} is not a file or folder here, nor a model id (owner/name)")
    return _hub_headers(text)


def checkpoint_files(folder: Path, op: str) -> list[Path]:
    """The files of a folder with a checkpoint: those of its index, else model.safetensors, else every .safetensors file.

    Raises:
        ValueError: an index that is none, or names files elsewhere.
        FileNotFoundError: there are none.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: 'weight_map' must map tensor names to file names")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index}: {outside[0]!r} is not a plain file name")
        files = [folder / name for name in names]
    else:
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{op}: {folder} holds no .safetensors file")
    return files


def _folder_headers(folder: Path) -> Headers:
    """All tensors of a folder."""
    headers: Headers = {}
    for file in checkpoint_files(folder, "plan"):
        for name, entry in _file_headers(file).items():
            if name in headers:
                raise ValueError(f"{file}: tensor {name} is in another file of the folder too")
            headers[name] = entry
    return headers


def _file_headers(path: Path) -> Headers:
    """Names, types and shapes of one file; nothing behind the header is read."""
    if not path.is_file():
        raise FileNotFoundError(f"plan: {path} is missing")
    try:
        with safe_open(path, framework="np") as file:  # maps read-only; "pt" needs memory for a mapping of this size
            if "isqtorch" in (file.metadata() or {}):
                raise ValueError(f"{path}: is quantized by isqtorch already; plan takes the original model")
            pieces = {name: file.get_slice(name) for name in file.keys()}
            return {name: (str(piece.get_dtype()), tuple(piece.get_shape())) for name, piece in pieces.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from None


def _hub_headers(repo: str) -> tuple[Headers, Mapping[str, Any]]:
    """Headers of a model on the Hub, by range requests, and its config.json."""
    import huggingface_hub

    try:
        metadata = huggingface_hub.get_safetensors_metadata(repo)
        config = read_json(Path(huggingface_hub.hf_hub_download(repo, "config.json")))
    except Exception as error:  # the client's own errors, its HTTP library's, and those of the socket
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"plan: cannot read the headers of {repo!r} from the Hub ({type(error).__name__}: {message}). Check the name and the "
            "connection, or give a local folder."
        ) from error
    headers: Headers = {}
    for file in metadata.files_metadata.values():
        headers.update({name: (info.dtype, tuple(info.shape)) for name, info in file.tensors.items()})
    return headers, config


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; ValueError if the file is none."""
    with open(path, "rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        content = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return content
