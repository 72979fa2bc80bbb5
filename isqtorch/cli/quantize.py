"""Quantize a model and write it to a folder: packed weights, configuration, generation settings and tokenizer.

    isqtorch quantize -m examples/demo_model/model --isq q4k -o demo-q4k
    isqtorch quantize -m ./my-model --isq auto --target-bpw 4.5 --calibration-file my.txt -o out --save-topology t.yaml
    isqtorch quantize -m ./my-model --isq 3 --imatrix my.imatrix --topology layers.yaml -o my-model-q3k
    isqtorch quantize -m ./my-model --isq q4k -o my-model-q4k --force        replaces an existing folder

Each weight is packed as it is read. The folder appears when it is complete. Every command accepts it as MODEL, and so
does `from_pretrained` if isqtorch is imported.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._common import (
    add_auto,
    add_details,
    add_device,
    add_importance,
    add_isq,
    add_json,
    add_model,
    add_policy,
    policy_options,
)

HELP = "quantize a model and write it as a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_isq(parser, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--force", action="store_true", help="replace a model folder that is there already")
    add_policy(parser)
    add_importance(parser)
    add_auto(parser)
    add_device(parser)
    parser.add_argument(
        "--save-topology", type=Path, metavar="FILE", help="YAML file of what each layer got, for --topology"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw error and bits of every layer (needs matplotlib)"
    )
    add_details(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from isqtorch.app.model import LoadedModel, check_request

    options = policy_options(args)
    check_request(args.model, args.isq, args.device, options)
    check_output(args.output, args.model, force=args.force)
    check_files(args.save_topology, args.plot)
    loaded = LoadedModel(args.model, args.isq, device=args.device, options=options)
    with new_folder(args.output) as folder:
        loaded.model.save_pretrained(folder)  # with the generation settings
        loaded.tokenizer.save_pretrained(folder)
    assert loaded.report is not None
    if args.save_topology:
        loaded.report.topology().save(args.save_topology)
    if args.plot:
        loaded.report.plot(args.plot)
    text = loaded.report.details() if args.details else str(loaded.report)
    print(loaded.report.to_json() if args.json else text)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


def check_files(*files: Path | None) -> None:
    """OSError if the folder of an output file does not exist: the files are written only at the end."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder {file.absolute().parent} for {file}")


def check_output(output: Path, model: str, *, force: bool) -> None:
    """OSError if writing would destroy files that the user did not allow to replace."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise FileExistsError(f"{output} exists and is not a folder; give a new one")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{output} exists and is not an empty folder; give a new one, or --force to replace it")
    if not (output / "config.json").is_file():
        raise FileExistsError(f"{output} is not a model folder (it has no config.json), so --force does not replace it")
    if Path(model).is_dir() and Path(model).resolve() == output.resolve():
        raise FileExistsError(f"{output} is the model itself; give another folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder next to `output`. On success it is renamed to `output`, otherwise it is removed."""
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
    old = temporary / "old"
    try:
        new = temporary / "new"
        new.mkdir()  # with the permissions that the user's umask gives
        yield new
        _finish(new)
        if output.exists():
            os.rename(output, old)
        try:
            os.rename(new, output)
        except OSError:
            if old.exists():
                os.rename(old, output)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Flush all files to disk, and give them the permissions of the folder: safetensors makes them private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
