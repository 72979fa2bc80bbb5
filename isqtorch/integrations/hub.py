"""Models on the Hugging Face Hub: their files in the local cache first, and the network only for what is not there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from isqtorch.files.checkpoints import read_json

_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_PIPELINE = "model_index.json"
_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


class HubError(OSError):
    """The Hub and its local cache do not give a file, for a reason."""

    def __init__(self, what: str, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"cannot get {what!r} from the Hub or its local cache ({reason}). Check the name and the connection, or give a local "
            "file or folder."
        )


def is_id(source: str) -> bool:
    """Whether a text can be the id of a model: `owner/name`, or `name` for a few old models."""
    return _ID.fullmatch(source) is not None and not source.startswith((".", "-"))


def check_source(source: str) -> None:
    """Raise if `source` is a path without a model: transformers would look it up on the Hub, with a confusing error."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / _PIPELINE).is_file():
            raise ValueError(
                f"{source} is a pipeline of diffusers. Load it with diffusers, and quantize its parts in place: "
                "isqtorch.quantize_(pipe.transformer, 4)"
            )
        if not (path / _CONFIG).is_file():
            raise FileNotFoundError(f"{source} has no config.json: it is not a model folder")
        config = read_json(path / _CONFIG)
        if "_diffusers_version" in config and "model_type" not in config:
            raise ValueError(
                f"{source} is a {config.get('_class_name', 'model')!s:.80} of diffusers. Load it with diffusers, and quantize it in "
                "place: isqtorch.quantize_(model, 4)"
            )
        return
    if path.exists():
        raise FileNotFoundError(
            f"{source} is a file that is no .gguf: give a folder with config.json and safetensors, a .gguf file, or a model id"
        )
    if not is_id(source):
        raise FileNotFoundError(
            f"no folder {source}: give a folder with config.json and safetensors, a .gguf file, or a model id"
        )


def cached_folder(repository: str, revision: str | None = None) -> Path | None:
    """The folder in the local cache that has the config.json of a model, or None. Never uses the network."""
    found = _cached(repository, _CONFIG, revision)
    return None if found is None else found.parent


def cached_snapshot(repository: str) -> Path | None:
    """The folder in the local cache that has the files of a pipeline of diffusers, or None. Never uses the network."""
    return None if (found := _cached(repository, _PIPELINE, None)) is None else found.parent


def cached_weights(repository: str, revision: str | None = None) -> list[str] | None:
    """The safetensors files of a model in the local cache, as transformers loads them; None if they are not complete."""
    single = _cached(repository, _SINGLE, revision)
    if single is not None:  # before the index, as transformers does
        return [str(single)]
    index = _cached(repository, _INDEX, revision)
    if index is None:
        return None
    mapping = read_json(index).get("weight_map")
    names = sorted(set(mapping.values())) if isinstance(mapping, dict) else []
    found = [_cached(repository, name, revision) for name in names if isinstance(name, str)]
    return [str(file) for file in found] if found and None not in found and len(found) == len(names) else None


def is_cached(source: str) -> bool:
    """Whether a model needs no network: it is a folder, or the local cache has its configuration and weights."""
    if Path(source).expanduser().is_dir():
        return True
    return cached_folder(source) is not None and cached_weights(source) is not None


def file_names(source: str, *, local: bool) -> list[str]:
    """The names of the files of a model, in a folder, in the local cache, or on the Hub; of subfolders as `a/b`.

    Raises:
        OSError: the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    folder = path if path.is_dir() else cached_folder(source) if local else None
    if folder is not None:
        inner = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
        files = [*folder.iterdir(), *(file for child in inner for file in child.iterdir())]
        return sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())
    if local:
        return []
    import huggingface_hub  # takes long to import

    with _as_os_error(source):
        return sorted(huggingface_hub.list_repo_files(source))


def fetch(source: str, name: str, *, local: bool) -> Path:
    """One file of a model, by a name of `file_names`, on this machine."""
    folder = Path(source).expanduser()
    return folder / name if folder.is_dir() else download(source, name, local=local)


def download(repository: str, name: str, *, local: bool = False) -> Path:
    """A file on the Hub: from the local cache if it is there, else from the network unless `local`.

    Raises:
        OSError: the Hub does not have it or cannot be reached.
    """
    cached = _cached(repository, name, None)
    if cached is not None:
        return cached
    import huggingface_hub  # takes long to import

    with _as_os_error(f"{repository}:{name}"):
        return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=local))


def snapshot(repository: str, patterns: Sequence[str], *, local: bool) -> Path:
    """The folder with all files of a model that match the patterns, as `download`."""
    import huggingface_hub  # takes long to import

    cached = cached_folder(repository)
    if cached is not None and cached_weights(repository) is not None:
        return cached
    with _as_os_error(repository):
        return Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=list(patterns), local_files_only=local)
        )


@contextmanager
def naming_hub(source: str) -> Iterator[None]:
    """Turn errors of the Hub, and about code of a model, into one line; other errors of folders are clear already."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source} is a model with Python code of its own, which is not run unless you trust it: "
            "isqtorch.load(..., trust_remote_code=True); the commands never run it"
        ) from error
    except OSError as error:
        if os.path.isdir(os.path.expanduser(source)):
            raise
        reason = error.reason if isinstance(error, HubError) else _first_line(error)
        raise OSError(
            f"cannot load {source!r}: there is no such folder here, and the Hub or its local cache does not give it ({reason}). "
            "Check the name and the connection, or give a local folder. A GGUF file on the Hub is owner/name:file.gguf."
        ) from error


@contextmanager
def _as_os_error(what: str) -> Iterator[None]:
    """Turn all errors of the client into an OSError of one line."""
    try:
        yield
    except Exception as error:  # the client's own errors, its HTTP library's, and those of the socket
        raise HubError(what, f"{type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _cached(repository: str, name: str, revision: str | None) -> Path | None:
    """A file in the local cache, or None."""
    import huggingface_hub  # takes long to import

    try:
        found = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
    except ValueError:  # for a name that is no valid id
        return None
    return Path(found) if isinstance(found, str) else None
