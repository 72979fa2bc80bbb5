"""save and load_: store a quantized model in one safetensors file and load it again, bit for bit.

The file holds the state dict. Packed weights are uint8 `[N, row_bytes]` (experts: `[E, N, row_bytes]`) under their
ordinary names; a shared tensor is stored once. The metadata entry "isqtorch" is JSON. It lists the packed layers with
their formats, and the names that share a tensor:

    {"format_version": 1,
     "layers": {"model.layers.0.mlp.up_proj": {"kind": "linear", "format": "q4k", "in_features": 256,
                                               "out_features": 768, "dtype": "bfloat16"}, ...},
     "shared": {"lm_head.weight": "model.embed_tokens.weight"}}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from isqtorch.files.checkpoints import opened
from isqtorch.files.storable import check_storable
from isqtorch.files.writing import replacing
from isqtorch.formats import QuantFormat, get_format
from isqtorch.inplace.host import announce
from isqtorch.inplace.origin import forget
from isqtorch.modules import PackedModule, QuantEmbedding, QuantExperts, QuantLinear
from isqtorch.modules.convert import layer_kind, locate, matrices, name_of, parameter_name, to_packed, weight_matrix
from isqtorch.modules.parameter import PackedParameter
from isqtorch.policy.inventory import storage_key
from isqtorch.text import first_names

FORMAT_VERSION = 1
_PIECE = 1 << 26  # bytes of a packed weight that are checked at once
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_ACTIVATIONS = [("fp8", "fp8", kind) for kind in ("linear", "conv1d")]  # allowed (activations, format, kind) of a layer


@dataclass(frozen=True)
class LayerEntry:
    """The entry of one packed layer in the file."""

    kind: str  # linear, conv1d, embedding or experts
    format: str
    in_features: int
    out_features: int
    dtype: str  # torch's name of the float type of the layer
    experts: int | None = None  # number of matrices in the stack; None for other kinds
    activations: str | None = None  # "fp8": see QuantLinear

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K], or [E, N, K]."""
        return (*(() if self.experts is None else (self.experts,)), self.out_features, self.in_features)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        return *self.shape[:-1], get_format(self.format).row_bytes(self.in_features)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Header:
    """The checked contents of the metadata entry."""

    layers: dict[str, LayerEntry]
    shared: dict[str, str]  # name -> name under which its tensor is stored


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model with quantized layers to a .safetensors file.

    The file is replaced atomically: a reader sees either the old file or the new one.

    Args:
        model: the model. Its whole state dict is written.
        path: the file to write.

    Raises:
        ValueError: the state dict holds something other than tensors, a tensor on the meta device, or one that no file of
            tensors can hold, such as those of torchao.
        OSError: the file cannot be written.

    Example:
        isqtorch.quantize_(model, "q4k")
        isqtorch.checkpoint.save(model, "model.safetensors")
    """
    path = Path(path)
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[object, str] = {}  # storage -> first name
    for name, tensor in model.state_dict().items():
        check_storable("save", name, tensor)
        tensor = tensor.resolve_conj().resolve_neg()  # such views have memory in which other values are
        first = names.setdefault(storage_key(tensor), name)
        if first == name:
            kept[name] = tensor.detach()
        else:
            shared[name] = first
    layers = {
        name_of(name, leaf): _entry_of(module, leaf).to_dict()
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
        for leaf in module.packed
    }
    header = {"format_version": FORMAT_VERSION, "layers": layers, "shared": shared}
    metadata = {"format": "pt", "isqtorch": json.dumps(header, separators=(",", ":"))}
    try:
        with replacing(path) as temporary:
            save_file(_separate(kept), temporary, metadata)
    except SafetensorError as error:  # how safetensors reports a full disk or a missing folder
        raise OSError(f"save: cannot write {path}: {error}") from error


def load_(model: nn.Module, path: str | os.PathLike[str], *, check_scales: bool = True) -> None:
    """Load a file of `save` into a model, in place.

    Packed layers replace the ordinary ones; other tensors are assigned.

    Args:
        model: a model of the same architecture, with any weights, also on the meta device; quantized or not.
        path: the file, or a folder with a model.safetensors.
        check_scales: look for scales that are not finite before anything is loaded. This reads the packed weights once
            more.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not one of `save`, is damaged, was written by a newer version, or does not fit the
            model. The model is unchanged.

    Example:
        model = AutoModelForCausalLM.from_config(config)
        isqtorch.checkpoint.load_(model, "model.safetensors")
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    with opened(path) as file:
        header = read_header(file.metadata(), path)
        stored = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: (tuple(piece.get_shape()), str(piece.get_dtype())) for name, piece in stored.items()}
        _check_fit(model, header, shapes, path)
        if check_scales:
            for name, entry in header.layers.items():
                key = parameter_name(model, name)
                if key not in header.shared:  # else it is checked under its other name
                    _check_scales(name, get_format(entry.format), file.get_slice(key), path)
        parameters: dict[str, nn.Parameter] = {}  # stored name -> the one parameter made of it
        done: dict[tuple[int, str], nn.Module] = {}
        for name, entry in header.layers.items():
            _load_layer(model, name, entry, header, file, parameters, done)
        packed = {parameter_name(model, name) for name in header.layers}
        for name in model.state_dict():
            if name not in packed:
                _load_tensor(model, name, header.shared.get(name, name), file, parameters)
    forget(model)
    announce(model, None)


def read_header(metadata: Mapping[str, str] | None, path: Path) -> Header:
    """The checked metadata entry of a file; ValueError if it is missing or not valid."""
    text = (metadata or {}).get("isqtorch")
    if text is None:
        raise ValueError(
            f"{path}: was not written by isqtorch.checkpoint.save (there is no 'isqtorch' in its metadata)"
        )
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: the isqtorch metadata is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the isqtorch metadata is not an object")
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: format_version is {version!r}, must be a positive number")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest known here. Upgrade isqtorch."
        )
    layers, shared = content.get("layers"), content.get("shared")
    if not isinstance(layers, dict) or not isinstance(shared, dict):
        raise ValueError(f"{path}: the isqtorch metadata must hold 'layers' and 'shared' objects")
    if not all(isinstance(name, str) for name in shared.values()):
        raise ValueError(f"{path}: 'shared' must map names to names")
    return Header({name: _parse_entry(name, entry, path) for name, entry in layers.items()}, shared)


# ---- writing ---------------------------------------------------------------------------------------------------------


def _entry_of(module: PackedModule, leaf: str) -> LayerEntry:
    *experts, rows, row_bytes = getattr(module, leaf).shape
    fmt, dtype = get_format(module.packed[leaf]), str(module.dtype).removeprefix("torch.")
    kind = _kind(module) or "linear"
    activations = module.activations if isinstance(module, QuantLinear) else None
    return LayerEntry(
        kind, fmt.name, fmt.in_features(row_bytes), rows, dtype, experts[0] if experts else None, activations
    )


def _kind(module: nn.Module) -> str | None:
    """The kind of an ordinary layer, or of the layer that a packed layer replaced."""
    if isinstance(module, QuantEmbedding):
        return "embedding"
    if isinstance(module, QuantLinear):
        return "linear" if module.origin is nn.Linear else "conv1d"
    return "experts" if isinstance(module, QuantExperts) else layer_kind(module)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory: safetensors accepts no others."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        storage = whole.untyped_storage().data_ptr()
        out[name] = whole.clone() if storage in seen else whole
        seen.add(storage)
    return out


# ---- reading ---------------------------------------------------------------------------------------------------------


def _parse_entry(name: str, entry: object, path: Path) -> LayerEntry:
    where = f"{path}: layer {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: is not an object")
    kind, dtype = entry.get("kind"), entry.get("dtype")
    if kind not in ("linear", "conv1d", "embedding", "experts"):
        raise ValueError(f"{where}: unknown kind {kind!r}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{where}: unknown dtype {dtype!r}")
    columns, rows, experts = entry.get("in_features"), entry.get("out_features"), entry.get("experts")
    counted = type(experts) is int and 0 < experts < 1 << 32
    if (experts is not None and not counted) or (kind == "experts") != counted:
        raise ValueError(f"{where}: experts is {experts!r}, must be a positive number for experts and nothing else")
    if type(columns) is not int or type(rows) is not int or not (0 < columns < 1 << 48 and 0 < rows < 1 << 48):
        raise ValueError(
            f"{where}: in_features and out_features are {columns!r} and {rows!r}, must be positive numbers"
        )
    activations = entry.get("activations")
    try:
        parsed = LayerEntry(kind, get_format(entry.get("format", "")).name, columns, rows, dtype, experts, activations)
        parsed.packed_shape  # noqa: B018  (checks that blocks divide in_features)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if activations is not None and (activations, parsed.format, kind) not in _ACTIVATIONS:
        raise ValueError(
            f"{where}: activations are {activations!r:.80}, which a {kind} layer in {parsed.format} does not have"
        )
    return parsed


def _check_fit(model: nn.Module, header: Header, shapes: Mapping[str, tuple[tuple[int, ...], str]], path: Path) -> None:
    """ValueError unless file and model have the same names and shapes, and packed layers match the layers there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    state = model.state_dict()
    dangling = [alias for alias, name in header.shared.items() if name not in shapes]
    missing = sorted((set(state) - set(shapes) - set(header.shared)) | set(dangling))
    unexpected = sorted((set(shapes) | set(header.shared)) - set(state))
    for names, what in ((missing, "lacks"), (unexpected, "holds, and the model does not have,")):
        if names:
            raise ValueError(f"{path}: the file {what} {first_names(names)}. It was made from another model.")
    entries = {}  # name in the state dict -> entry
    for name, entry in header.layers.items():
        owner, leaf = locate(model, name)
        module = modules.get(owner)
        if module is None or _kind(module) != entry.kind or leaf not in matrices(module):
            nothing = module is None or (leaf != "weight" and leaf not in module._parameters)
            found = "nothing" if nothing else f"a {type(module).__name__}"
            raise ValueError(f"{path}: {name} is a packed {entry.kind} layer, the model has {found} there")
        size = _size(module, leaf)
        if size != entry.shape:
            raise ValueError(f"{path}: {name} is {list(entry.shape)}, in the model it is {list(size)}")
        entries[parameter_name(model, name)] = entry
    for name in entries:
        owner, _, _ = name.rpartition(".")
        absent = [leaf for leaf in matrices(modules[owner]) if f"{owner}.{leaf}".lstrip(".") not in entries]
        if absent:
            raise ValueError(f"{path}: {name} is packed, {absent[0]} of the same experts is not. The file is damaged.")
    for name, tensor in state.items():
        shape, dtype = shapes[header.shared.get(name, name)]
        owner, _, leaf = name.rpartition(".")
        packed = entries.get(name)
        want = tuple(tensor.shape) if packed is None else packed.packed_shape
        integer = packed is not None or not (tensor.is_floating_point() or tensor.is_complex())
        if (
            shape != want
            or (packed is not None and dtype != "U8")
            or integer != dtype.startswith(("I", "U", "B0", "BOOL"))
            or (packed is None and tensor.is_complex()) != dtype.startswith("C")
        ):
            raise ValueError(
                f"{path}: tensor {name} is {dtype} {list(shape)}, must be {'U8' if packed else tensor.dtype} {list(want)}"
            )
        if owner not in modules or leaf not in {**modules[owner]._parameters, **modules[owner]._buffers}:
            raise ValueError(
                f"{path}: {name} is neither a parameter nor a buffer of the model, so it cannot be assigned"
            )
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and name not in state:
            raise ValueError(
                f"load_: the buffer {name} is on the meta device and not part of the state dict, so no file has it. Build the model "
                "so that buffers are real (accelerate.init_empty_weights does), or on the CPU."
            )


def _check_scales(name: str, fmt: QuantFormat, stored: Any, path: Path) -> None:
    """ValueError if a scale or offset of a packed weight is NaN or infinite: products with it would be, too."""
    rows, *rest = stored.get_shape()
    blocks_of_one = math.prod(rest) // fmt.block_bytes  # of a row, or of an expert
    step = max(1, _PIECE // math.prod(rest))
    for first in range(0, rows, step):
        blocks: Tensor = stored[first : first + step].reshape(-1, fmt.block_bytes)
        for part in fmt.parts:
            if not part.real:
                continue
            values = part.numbers(blocks)
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                block = int(bad[0])
                raise ValueError(
                    f"{path}: {name}: {'expert' if len(rest) > 1 else 'row'} {first + block // blocks_of_one} has a {part.name} "
                    f"that is {values[block]} ({fmt.name}). The file is damaged, or the weight was not finite when it was "
                    "packed. check_scales=False loads it all the same."
                )


def _size(module: nn.Module, leaf: str) -> tuple[int, ...]:
    """Shape (N, K) or (E, N, K) of a weight, packed or not."""
    if isinstance(module, QuantEmbedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, QuantLinear):
        return module.out_features, module.in_features
    if isinstance(module, QuantExperts):
        *rows, row_bytes = getattr(module, leaf).shape
        return *rows, get_format(module.packed[leaf]).in_features(row_bytes)
    return tuple(weight_matrix(module, leaf).shape)


def _load_layer(
    model: nn.Module,
    name: str,
    entry: LayerEntry,
    header: Header,
    file: Any,
    parameters: dict[str, nn.Parameter],
    done: dict[tuple[int, str], nn.Module],
) -> None:
    """Replace the layer at `name` by a packed one."""
    fmt: QuantFormat = get_format(entry.format)
    path, leaf = locate(model, name)
    old = model.get_submodule(path)
    name = f"{path}.{leaf}"
    key = header.shared.get(name, name)
    if key in parameters and old._parameters[leaf] is parameters[key]:
        return  # a module with several names: replaced already
    if (id(old), leaf) not in done:
        if key not in parameters:
            parameters[key] = PackedParameter(_read(file, key, old._parameters[leaf]))
        new = to_packed(old, parameters[key], fmt, leaf)
        new.dtype = _DTYPES[entry.dtype]
        if isinstance(new, QuantLinear):
            new.activations = entry.activations
        done[id(old), leaf] = new
    parent, _, child = path.rpartition(".")
    model.get_submodule(parent)._modules[child] = done[id(old), leaf]


def _load_tensor(model: nn.Module, name: str, key: str, file: Any, parameters: dict[str, nn.Parameter]) -> None:
    """Assign one parameter or buffer; names that share a stored tensor share one parameter."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = _read(file, key, owner._buffers[leaf])
        return
    old = owner._parameters[leaf]
    assert old is not None
    if key not in parameters:
        parameters[key] = nn.Parameter(_read(file, key, old), requires_grad=old.requires_grad)
    owner._parameters[leaf] = parameters[key]


def _read(file: Any, key: str, like: Any) -> Tensor:
    """A tensor of the file, on the device of the one it replaces (the CPU for meta)."""
    tensor: Tensor = file.get_tensor(key)
    return tensor if like is None or like.device.type == "meta" else tensor.to(like.device)
