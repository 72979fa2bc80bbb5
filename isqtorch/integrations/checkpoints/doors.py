"""Recognize a checkpoint of another program: a GGUF file here or on the Hub, or an MLX folder or repository."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from isqtorch.files.checkpoints import checkpoint_files, gguf_in, opened, read_json
from isqtorch.integrations.hub import cached_folder, download, is_id, naming_hub, snapshot

from .incoming import Checkpoint
from .mlx.settings import is_mlx

_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+):([^:\\]+\.gguf)", re.IGNORECASE)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_MLX_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def open_checkpoint(source: str | os.PathLike[str], *, local: bool = False) -> Checkpoint | None:
    """Open a source if it is a checkpoint of another program.

    Args:
        source: a .gguf file, a folder with one, `owner/name:file.gguf` for a file on the Hub, an MLX folder, or the id
            of an MLX repository. The cache of the Hub is used before the network.
        local: never use the network.

    Returns:
        The checkpoint; None for every other source, such as the folder of a transformers model.

    Raises:
        ValueError: the file is damaged, or a folder holds several GGUF files and nothing else.
        OSError: a file does not exist, or the Hub does not give it.
    """
    file = gguf_file(source, local=local)
    if file is not None:
        from .gguf.checkpoint import GgufCheckpoint

        return GgufCheckpoint(file)
    folder = _mlx_folder(os.fspath(source), local=local)
    if folder is None:
        return None
    from .mlx.checkpoint import MlxCheckpoint

    return MlxCheckpoint(folder)


def checkpoint_of(files: Sequence[str]) -> Checkpoint | None:
    """The checkpoint of another program that these files are; None for those of a transformers model.

    Raises:
        ValueError, OSError: as `open_checkpoint`.
    """
    first = Path(files[0])
    if first.suffix.lower() == ".gguf":
        return open_checkpoint(first, local=True)
    folder = _mlx_folder(str(first.parent), local=True)
    return None if folder is None else open_checkpoint(folder, local=True)


def gguf_file(source: str | os.PathLike[str], *, local: bool = False) -> Path | None:
    """The GGUF file that a source names, with all its shards on this machine; None if it names none."""
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return gguf_in(path)
    if path.exists() or not text.lower().endswith(".gguf"):
        return path if path.suffix.lower() == ".gguf" else None
    named = _ON_HUB.fullmatch(text)
    if named is None:
        raise FileNotFoundError(f"no file {text}: give a .gguf file here, or owner/name:file.gguf for one on the Hub")
    repository, name = named.groups()
    files = [download(repository, each, local=local) for each in shards(name)]
    return files[0]


def shards(name: str) -> list[str]:
    """The names of all files of a GGUF checkpoint, from the name of one of them; the first one first."""
    parts = _SHARD.fullmatch(name)
    if parts is None:
        return [name]
    stem, _, count, end = parts.groups()
    return [f"{stem}-{number:05}-of-{count}{end}" for number in range(1, int(count) + 1)]


def _saved_by_mlx(folder: Path) -> bool:
    """Whether MLX has written the weights of a folder. If they are float, config.json does not tell, but they are changed.

    False if they are not here, or damaged: whoever loads them says so.
    """
    try:
        with opened(checkpoint_files(folder, "load")[0], "np") as file:
            return (file.metadata() or {}).get("format") == "mlx"
    except (OSError, ValueError):
        return False


def _mlx_folder(source: str, *, local: bool) -> Path | None:
    """The folder of an MLX model, on the Hub with all its files on this machine; None for other models."""
    path = Path(source).expanduser()
    if path.is_dir():
        config = path / "config.json"
        return path if config.is_file() and (is_mlx(read_json(config)) or _saved_by_mlx(path)) else None
    if path.exists() or not is_id(source):
        return None
    folder = cached_folder(source)
    if folder is None:
        if local:
            return None
        with naming_hub(source):  # every model has it, so there is no need to ask for anything else
            folder = download(source, "config.json").parent
    if not is_mlx(read_json(folder / "config.json")) and not _saved_by_mlx(folder):
        return None
    return snapshot(source, _MLX_FILES, local=local)
