"""Checkpoints on disk and on the Hub: the list of their files, and the headers of these files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from .binary import read_bytes, regular

Headers = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors dtype, shape)."""


MAX_JSON_BYTES = 1 << 26  # the index of the largest models is a few MB
_INDEX_END = ".safetensors.index.json"
_DIFFUSERS = "diffusion_pytorch_model"
_FIRST = ("model.safetensors", f"model{_INDEX_END}", f"{_DIFFUSERS}{_INDEX_END}", f"{_DIFFUSERS}.safetensors")
"""What is read if it is there, the first of them: in the order of transformers, and in that of diffusers."""


class Checkpoint(NamedTuple):
    """The parts of a checkpoint that can be read without reading a weight."""

    headers: Headers
    config: Mapping[str, Any]  # config.json; empty if there is none
    metadata: dict[str, str]  # of the safetensors files


def read_headers(source: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a folder, of a .safetensors file, or of a model on the Hub.

    Raises:
        TypeError: `source` is neither a string nor a path.
        ValueError: a file is damaged.
        OSError: there is no such file, folder or model, or the Hub cannot be reached.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"plan: model must be an nn.Module, a path or a model id, got {type(source).__name__}")
    path = Path(source).expanduser()
    if path.is_dir():
        config_path = path / "config.json"
        return _folder_headers(path)._replace(config=read_json(config_path) if config_path.exists() else {})
    if path.exists():
        return _file_headers(path)
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
    """List the files of a checkpoint: those that transformers or diffusers loads from the folder, else all .safetensors files.

    transformers takes the first of these that is there: the file or index that `transformers_weights` in config.json
    names, model.safetensors, and the files in model.safetensors.index.json. `save_pretrained` in one file over an older
    save in shards leaves the old index, so the single file is the newer one. diffusers takes its index first. Files of a
    variant, such as model.fp16.safetensors, are used only if there is nothing else.

    Args:
        folder: the folder of the checkpoint.
        op: name of the calling function, for messages.

    Raises:
        ValueError: the index is malformed, or names a file in another folder.
        FileNotFoundError: the folder has no .safetensors file.
    """
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.exists() else None
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or not named.endswith((".safetensors", _INDEX_END)):
            raise ValueError(
                f"{config}: 'transformers_weights' is {named!r:.80}, must be the name of a .safetensors file or index here"
            )
        chosen = folder / named
        return _indexed(chosen) if named.endswith(_INDEX_END) else [chosen]
    for name in _FIRST:
        path = folder / name
        if path.exists():
            return _indexed(path) if name.endswith(_INDEX_END) else [path]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{op}: {folder} holds no .safetensors file")
    return files


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other model; None if there is none.

    Raises:
        ValueError: there are several, and nothing says which one is meant.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    if not files or (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return None
    first = [path for path in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}$", path.stem)]
    if len(first) != 1:
        names = ", ".join(path.name for path in (first or files)[:20])
        raise ValueError(f"{folder} holds {len(first or files)} GGUF files; give one of them: {names}")
    return first[0]


def _indexed(index: Path) -> list[Path]:
    """List the files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"{index}: 'weight_map' must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: {outside[0]!r:.200} is not a plain file name")
    return [index.parent / name for name in names]


def _folder_headers(folder: Path) -> Checkpoint:
    """Read the headers of all files of a folder."""
    headers: Headers = {}
    metadata: dict[str, str] = {}
    for file in checkpoint_files(folder, "plan"):
        found = _file_headers(file)
        twice = sorted(set(found.headers) & set(headers))
        if twice:
            raise ValueError(f"{file}: tensor {twice[0]} is in another file of the folder too")
        headers |= found.headers
        metadata |= found.metadata
    return Checkpoint(headers, {}, metadata)


def _file_headers(path: Path) -> Checkpoint:
    """Read names, types and shapes of one file; only the header is read."""
    with opened(path, "np") as file:  # "np" maps read-only; "pt" needs memory for a mapping of this size
        pieces = {name: file.get_slice(name) for name in file.keys()}
        headers = {name: (str(piece.get_dtype()), tuple(piece.get_shape())) for name, piece in pieces.items()}
        return Checkpoint(headers, {}, dict(file.metadata() or {}))


@contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file; the file is mapped.

    Args:
        path: the file.
        framework: the type of its tensors: "pt" (torch) or "np" (numpy).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged. This may show only when a tensor is read inside the block.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    regular(path)
    with complete(path), safe_open(path, framework=framework) as file:
        yield file


@contextmanager
def complete(path: Path) -> Iterator[None]:
    """Turn errors of the safetensors library inside the block into a ValueError that names the file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from None


def _hub_headers(repo: str) -> Checkpoint:
    """Read the headers of a model on the Hub by HTTP range requests, and download its config.json."""
    import huggingface_hub  # takes long to import

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
    return Checkpoint(headers, config, {})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most `MAX_JSON_BYTES`.

    Raises:
        ValueError: the path is not a regular file, or the file holds no such object.
        OSError: the file cannot be read.
    """
    text = read_bytes(path, MAX_JSON_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return content


def special_floats(value: Any) -> Any:
    """Undo how transformers and mlx-lm write numbers that JSON does not have: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        tag = value.get("__float__")
        if len(value) == 1 and tag in ("Infinity", "-Infinity", "NaN"):
            return float(tag)
        return {name: special_floats(each) for name, each in value.items()}
    return [special_floats(each) for each in value] if isinstance(value, list) else value
