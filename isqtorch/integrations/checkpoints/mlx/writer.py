"""Write a model as a folder of MLX; see `export_mlx`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from isqtorch.files.tensors_writing import write_shards
from isqtorch.files.writing import check_place, recover, replacing_folder
from isqtorch.inplace.host import files_of
from isqtorch.inplace.origin import Origin
from isqtorch.integrations.checkpoints.exporting import check_layers, tokenizer_of

from .configuration import configuration, refusal
from .layouts import LAYOUTS, Layout
from .outgoing import parts_of, pieces_of

OP = "export_mlx"


def write_folder(model: Any, folder: str | os.PathLike[str], tokenizer: Any) -> None:
    """Write a model; see `export_mlx`."""
    target = Path(folder).expanduser()
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise ValueError(
            f"{OP}: the model is a {type(model).__name__}, must be a model of transformers: MLX reads its configuration"
        )
    layout = check_config(config)
    check_layers(OP, model, "an MLX folder")
    parts = parts_of(model, layout, OP)
    pieces = [piece for part in parts for piece in pieces_of(part, layout, OP)]
    settings = {part.path: setting for part in parts if (setting := part.setting) is not None}
    entries = configuration(model, settings, OP)
    _check(target, model)
    found: Any = tokenizer_of(OP, model) if tokenizer is None else tokenizer
    generation: Any = getattr(model, "generation_config", None)
    recover(target)
    with replacing_folder(target, kept=lambda path: False) as new:
        write_shards(new, pieces, {"format": "mlx"})
        (new / "config.json").write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if generation is not None:
            generation.save_pretrained(new)
        if found is not False:
            found.save_pretrained(new)


def check_config(config: Any) -> Layout:
    """How MLX stores a model with this configuration.

    Raises:
        NotImplementedError: it is not known, or mlx-lm computes such a model otherwise.
    """
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise NotImplementedError(
            f"{OP}: models of type {config.model_type!r} cannot be written. Those that can: {', '.join(sorted(LAYOUTS))}."
        )
    why = refusal(config)
    if why is not None:
        raise NotImplementedError(f"{OP}: a model of type {config.model_type!r} cannot be written for mlx-lm, {why}.")
    return layout


def check_weights(model: Any) -> None:
    """Check what loading would give, before it is loaded: the formats, and types of floats.

    Args:
        model: the model; may be on the meta device.

    Raises:
        ValueError: MLX does not have a format or a type, or no place for a weight.
        NotImplementedError: MLX does not have such models.
    """
    layout = check_config(model.config)
    for part in parts_of(model, layout, OP):
        pieces_of(part, layout, OP)


def _check(target: Path, model: Any) -> None:
    """OSError if writing the folder would destroy anything."""
    origin = Origin.of(model)
    files = (*files_of(model), *(origin.files if origin is not None else ()))
    # A GGUF file is the whole model: what lies beside it has nothing to do with it.
    places = (file if file.endswith(".gguf") else os.path.dirname(file) for file in files)
    for place in sorted({str(model.config.name_or_path or ""), *places}):
        check_place(target, place)
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{OP}: {target} exists and is not an empty folder; give a new one")
