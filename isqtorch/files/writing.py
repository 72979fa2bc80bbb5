"""Atomic writing: a file or folder appears under its name only when it is complete.

The new content is written into a temporary folder beside its destination, and renamed at the end. The temporary folder
is locked while its process lives. So the next write to the same destination recognises a folder that a killed process
left, and removes it.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .system import flush, release, try_lock

_OLD, _NEW = "old", "new"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path. At the end its file replaces `path`; after an error `path` is unchanged.

    The temporary path holds an empty file. The caller may write into it or replace it: the final file always has the
    permissions that the user's umask gives.

    Raises:
        OSError: `path` is a folder, a device or a pipe, or its folder does not exist; or as `open` and writing do. The
            error names a file.
    """
    target = Path(path)
    _check_file(target)
    with _naming(target), _beside(target) as folder:
        temporary = folder / _NEW
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        os.chmod(temporary, mode)
        flush(temporary)
        _check_file(target)  # again: writing may have taken an hour
        os.replace(temporary, target)


def _check_file(target: Path) -> None:
    """OSError if no file can be put there, or if it would take the place of something else, such as /dev/null."""
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{target} exists and is not a file; give another name")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {target.absolute().parent} for {target}")


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Add the name to errors that have none: writing does not know it, if the disk is full or a limit is reached."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise type(error)(error.errno, error.strerror, str(target)) from error
        raise


def write_atomically(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    """Write a file through `replacing`. Raise OSError as `replacing` does."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(pieces)


@contextmanager
def replacing_folder(target: Path, kept: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder. At the end it takes the place of the folder `target`; after an error `target` is unchanged.

    Files of the old folder for which `kept` is true, and which the new folder does not have, are put into the new one
    first. The old folder is moved aside, and removed when the new one is in place. If the process is killed between the two
    moves, the next call, or `recover`, moves the old folder back.

    Raises:
        OSError: as writing and renaming do.
    """
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _naming(target), _beside(target) as folder:
        new, old = folder / _NEW, folder / _OLD
        new.mkdir()  # with the permissions that the user's umask gives
        yield new
        _finish(new)
        _keep(target, new, kept)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise


def check_place(output: Path, model: str) -> None:
    """FileExistsError if a folder cannot be written at `output` without harm to something else.

    Args:
        output: the folder to write.
        model: the model that is written: its folder or file; an id is of no interest.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise FileExistsError(f"{output} exists and is not a folder; give a new one")
    place, here = output.resolve(), Path.cwd()
    if place == here or place in here.parents:
        raise FileExistsError(f"{output} is the current folder or holds it; give a new folder, such as {output}/packed")
    if model and os.path.exists(model):
        source = Path(model).resolve()
        if place == source:
            raise FileExistsError(f"{output} is the model itself; give another folder")
        if place in source.parents or source in place.parents:
            relation = "holds the model" if place in source.parents else "lies in the folder of the model"
            raise FileExistsError(f"{output} {relation} {model}; give a folder beside it")


def _keep(old: Path, new: Path, kept: Callable[[Path], bool]) -> None:
    """Give the kept files a second name in the new folder, so that they are in one of the two at any moment."""
    for path in old.iterdir() if old.is_dir() else ():
        target = new / path.name
        if os.path.lexists(target) or not kept(path):
            continue
        try:
            os.link(path, target)
        except OSError:  # a file system without hard links
            shutil.copy2(path, target)


def recover(target: Path) -> None:
    """Remove what killed writes to `target` left, and move back a folder that one of them had moved aside."""
    for left in glob.glob(glob.escape(_prefix(target)) + "*"):
        if os.path.islink(left) or not os.path.isdir(left):
            continue
        lock = try_lock(left, wait=False)
        if lock is None:
            continue  # its process is alive, or it is not ours
        try:
            if os.path.isdir(os.path.join(left, _OLD)) and not os.path.lexists(target):
                os.rename(os.path.join(left, _OLD), target)
        except OSError:
            os.close(lock)
            raise
        release(left, lock)


def _prefix(target: Path) -> str:
    """Path of the temporary folders of `target`, without their random ends."""
    whole = target.absolute()
    return str(whole.parent / f".{whole.name}.isqtorch-")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A locked temporary folder in the folder of `target`. It is removed at the end with all that it holds."""
    recover(target)
    prefix = Path(_prefix(target))
    while True:
        folder = tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent)
        lock = try_lock(folder, wait=True)
        if lock is not None:
            break  # else another process took it for one that was left, in the moment before the lock
    try:
        yield Path(folder)
    finally:
        release(folder, lock)


def _finish(folder: Path) -> None:
    """Flush all files to disk, and give them the permissions of the folder: safetensors makes them private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
            flush(path)
