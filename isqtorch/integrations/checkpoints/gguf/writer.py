"""Write a model as a GGUF file: checks, places of weights, metadata."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from isqtorch.files.gguf_writing import Entry, Value, write_gguf
from isqtorch.inplace.host import files_of
from isqtorch.inplace.origin import Origin
from isqtorch.integrations.checkpoints.exporting import check_layers, tokenizer_of
from isqtorch.text import first_names

from .architectures import ARCHITECTURES, of_config
from .assumptions import difference, losses
from .layout import Place
from .outgoing import TYPES, Source, entries, sources
from .record import Architecture
from .rope import tensors_of
from .vocabulary import vocabulary

OP = "export_gguf"
_QUANTIZATION_VERSION = 2  # of ggml's blocks

# Labels for a whole file. Programs show them; none of them computes with them.
_FILE_TYPES = {name: row.label for name, row in TYPES.items() if name is not None and row.label is not None}
_MIXES = {"q3k": 12, "q4k": 15, "q5k": 17}  # with better k-quants for some layers
_K_QUANTS = tuple(name for name, row in TYPES.items() if row.name.endswith("_K"))
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}

# What llama.cpp does with the output head of an architecture. Of all others, it takes the embedding if there is none.
_MUST_HAVE_HEAD = frozenset(
    {"dots1", "gpt-oss", "gptneox", "minimax-m2", "nemotron", "olmo2", "olmoe", "phi2", "qwen2moe", "stablelm"}
)
_NEVER_HAS_HEAD = frozenset({"cohere2", "command-r", "gemma", "gemma2"})
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"


def write_model(
    model: nn.Module, path: str | os.PathLike[str], tokenizer: Any, name: str | None, pre: str | None
) -> None:
    """Write a model; see `export_gguf`."""
    path = os.path.expanduser(path)
    config = _text_config(model)
    _check_path(path, model)
    architecture = check_config(config)
    check_layers(OP, model, "a GGUF file")
    try:
        keys = architecture.keys(config)
        extras = tensors_of(config, architecture.head) if architecture.head else {}
    except ValueError as error:
        raise ValueError(f"{OP}: {error}") from None
    placed, left = _place(model, architecture, config)
    why = difference(
        architecture.name, config, {name: source.name for source, place in placed for name in place.tensors}
    )
    if why is not None:
        raise ValueError(f"{OP}: {type(model).__name__} cannot be written as GGUF: {why}")
    tensors = [*entries(OP, placed), *(_extra(name, values) for name, values in extras.items())]
    metadata: dict[str, Value] = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": name or _name(model),
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": _file_type(placed),
        **{f"{architecture.name}.{key}": value for key, value in keys.items()},
    }
    lost = losses(architecture.name, config)
    lost += [f"{len(left)} weights of images or sound are left out: {first_names(left)}"] if left else []
    if tokenizer is False:
        metadata["tokenizer.ggml.model"] = "none"
    else:
        given = tokenizer_of(OP, model) if tokenizer is None else tokenizer
        found = vocabulary(OP, given, _rows(tensors), pre, architecture.name)
        metadata |= found.metadata
        lost += [f"the tokenizer {loss}, which llama.cpp will not do" for loss in found.losses]
        metadata |= _end_of_turn(model, metadata)
    for loss in lost:
        warnings.warn(f"{OP}: {loss}", stacklevel=3)
    write_gguf(path, metadata, tensors)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_path(path: str | os.PathLike[str], model: nn.Module) -> None:
    """OSError if the file would take the place of a folder, or of the file with the model's own weights."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{OP}: {os.fspath(path)} is a folder; give the name of a file")
    origin = Origin.of(model)
    files = (*files_of(model), *(origin.files if origin is not None else ()))
    if os.path.exists(path) and any(os.path.exists(file) and os.path.samefile(path, file) for file in files):
        raise FileExistsError(f"{OP}: the model was loaded from {os.fspath(path)}; give another file")


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise ValueError(
            f"{OP}: the model is a {type(model).__name__}, must be a model of transformers: GGUF stores its configuration"
        )
    return config.get_text_config()


def check_config(config: Any) -> Architecture:
    """The architecture with which a model of this text config is written.

    Raises:
        NotImplementedError: there is none.
    """
    known = {kind for record in ARCHITECTURES if record.model is None for kind in record.model_types}  # no encoders
    if config.model_type not in known:
        raise NotImplementedError(
            f"{OP}: models of type {config.model_type!r} cannot be written. Those that can: {', '.join(sorted(known))}."
        )
    return of_config(config)


def check_weights(model: Any) -> None:
    """Check what loading would give, before it is loaded: names, formats and the order of columns.

    Args:
        model: the model; may be on the meta device.

    Raises:
        ValueError: a weight has no place in a file, or is packed in a way that the file cannot hold.
        NotImplementedError: the file cannot hold such models.
    """
    config = _text_config(model)
    placed, _ = _place(model, check_config(config), config)
    entries(OP, placed)


def _place(model: Any, architecture: Architecture, config: Any) -> tuple[list[tuple[Source, Place]], list[str]]:
    """Where each weight goes, and the names of weights that belong to other parts than the text model."""
    placed: list[tuple[Source, Place]] = []
    lost: list[str] = []
    for source in sources(model):
        places = architecture.places(source.name.replace("language_model.", ""), config)
        if places:
            placed.append((source, places[0]))
        else:
            lost.append(source.name)
    text = config is not model.config
    wrong = [name for name in lost if not text or "language_model." in name or name.startswith("lm_head.")]
    if wrong:
        raise ValueError(
            f"{OP}: a GGUF file of architecture {architecture.name!r} has no place for {first_names(wrong)} of {type(model).__name__}"
        )
    names = {name for _, place in placed for name in place.tensors}
    if _HEAD in names and architecture.name in _NEVER_HAS_HEAD:
        raise ValueError(
            f"{OP}: the output head has weights of its own, and a GGUF file of architecture {architecture.name!r} has none: llama.cpp "
            "uses the embedding. Tie them (model.tie_weights()) before quantizing."
        )
    if _EMBEDDING not in names or (_HEAD not in names and not _is_tied(model)):
        raise ValueError(f"{OP}: {type(model).__name__} has no output head. Load the model with AutoModelForCausalLM.")
    if _HEAD not in names and architecture.name in _MUST_HAVE_HEAD:
        table = next(source for source, place in placed if _EMBEDDING in place.tensors)
        placed.append((table, Place((_HEAD,))))
    return placed, lost


def _is_tied(model: Any) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and table is not None and head._parameters.get("weight") is table._parameters.get("weight")


# ---- metadata --------------------------------------------------------------------------------------------------------


def _extra(name: str, values: NDArray[np.float32]) -> Entry:
    """A small tensor that is computed from the configuration."""
    return Entry(name, tuple(reversed(values.shape)), values.nbytes, read=lambda: [values.tobytes()])


def _name(model: Any) -> str:
    source = os.path.basename(os.path.abspath(str(model.config.name_or_path))) if model.config.name_or_path else ""
    return source.removesuffix(".gguf") or type(model).__name__


def _file_type(placed: Iterable[tuple[Source, Place]]) -> int:
    """The label of the most frequent format, or of the mix that llama.cpp has for it."""
    matrices = [(source, place.tensors[0].startswith("blk.")) for source, place in placed if source.tensor.dim() > 1]
    formats = Counter(source.format for source, _ in matrices if source.format is not None)
    if not formats:
        return _FLOATS.get(matrices[0][0].tensor.dtype, 0) if matrices else 0
    (most, _), *_ = formats.most_common(1)
    in_blocks = {source.format for source, is_block in matrices if is_block and source.format in _K_QUANTS}
    return _MIXES.get(most, _FILE_TYPES[most]) if len(in_blocks) > 1 else _FILE_TYPES[most]


def _rows(tensors: Sequence[Entry]) -> int:
    """The number of rows of the embedding."""
    return next(tensor.dims[1] for tensor in tensors if tensor.name == _EMBEDDING)


def _end_of_turn(model: Any, metadata: dict[str, Value]) -> dict[str, Value]:
    """The token that ends an answer, if the generation settings have another one than the tokenizer."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if ends and "tokenizer.ggml.eos_token_id" not in metadata:
        return {"tokenizer.ggml.eos_token_id": int(ends[0])}
    others = [end for end in ends if end != metadata.get("tokenizer.ggml.eos_token_id")]
    return {"tokenizer.ggml.eot_token_id": int(others[0])} if others else {}
