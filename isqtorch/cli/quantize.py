"""Quantize a model and write it to a folder: packed weights, configuration, generation settings and tokenizer.

    isqtorch quantize -m examples/demo_model/model --isq q4k -o demo-q4k
    isqtorch quantize -m ./my-model --isq q4k,q8_0 -o packed             writes packed/q4k and packed/q8_0
    isqtorch quantize -m ./my-model --isq auto --target-bpw 4.5 --calibration-file my.txt -o out --save-topology t.yaml
    isqtorch quantize -m ./my-model --isq afq3 --rule feedback --calibration-file my.txt --refine 200 -o out
    isqtorch quantize -m ./my-model --isq 3 --imatrix my.imatrix --topology layers.yaml -o my-model-q3k
    isqtorch quantize -m ./my-model --isq q4k -o my-model-q4k --force    replaces what it wrote there before
    isqtorch quantize -m my-model.gguf -o my-model-gguf                  keeps the packed weights of a GGUF file or MLX folder

README.md in the folder is a model card: formats, sizes, this command, how to load. Another README.md there is never replaced.
A model of any class is written as its own class, with its processor and the files of a sentence embedder. Each weight is
packed as it is read. The folder appears when it is complete. Every command accepts it as MODEL, and so does
`from_pretrained` if isqtorch is imported. With several formats, the model is read once and calibrated once, if its floats
fit into memory; else it is read for each format, and a line says so. --force replaces the model in a folder that this
command wrote, and keeps files of other kinds there. It refuses a folder with another model, and one that holds MODEL or
lies in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from isqtorch.files.checkpoints import read_json
from isqtorch.files.writing import check_place, recover, replacing_folder
from isqtorch.integrations.companions import is_module
from isqtorch.integrations.record import METHOD
from isqtorch.text import first_names

from ._common import (
    add_auto,
    add_details,
    add_device,
    add_importance,
    add_isq,
    add_json,
    add_model,
    add_policy,
    calibration_of,
    policy_options,
)

if TYPE_CHECKING:
    from isqtorch.app.model import LoadedModel
    from isqtorch.integrations.opening import Opened

HELP = "quantize a model and write it as a checkpoint"

_WEIGHTS = re.compile(
    r"model(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)  # as save_pretrained names them
_TEMPLATES = "additional_chat_templates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_isq(parser, required=False, several=True)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="new or empty folder; of several formats, their folders",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a folder that this command wrote; other files in it stay"
    )
    add_policy(parser)
    add_importance(parser)
    parser.add_argument(
        "--refine",
        type=int,
        metavar="STEPS",
        help="afterwards tune scales and norms against the float model on the calibration text, in so many steps (200 is enough)",
    )
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
    from isqtorch.app.model import check_request, options_for
    from isqtorch.app.several import packed_in_turn

    options = policy_options(args)
    formats = (
        list(dict.fromkeys(part.strip() for part in (args.isq or "").split(","))) if args.isq is not None else [None]
    )
    several = len(formats) > 1
    for isq in formats[1:]:
        check_request(args.model, isq, args.device, options_for(isq, options))
    opened = check_request(
        args.model, formats[0], args.device, options_for(formats[0], options) if several else options
    )
    _check_format(args, opened)
    _check_refine(args, opened)
    if several:
        check_parent(args)
    targets = {isq: args.output / isq if several else args.output for isq in formats}
    for target in targets.values():
        recover(target)
        check_output(target, args.model, force=args.force)
    check_files(args.save_topology, args.plot)
    reports = {}
    turns = packed_in_turn(
        args.model, formats, opened=opened, device=args.device, options=options, refined=args.refine is not None
    )
    for isq, loaded in turns:
        if loaded.report is None:
            raise ValueError(f"{args.model} holds no packed weights, and none was packed: give another --isq FORMAT")
        if args.refine is not None:
            refine(args, loaded)
        _write(loaded, targets[isq], args)
        reports[isq] = loaded.report
        if not args.json:
            print(loaded.report.details() if args.details else str(loaded.report))
        print(f"wrote {targets[isq]}", file=sys.stderr)
    if args.json:
        found = {isq: report.to_dict() for isq, report in reports.items()}
        print(json.dumps(found, indent=2) if several else reports[formats[0]].to_json())
    return 0


def _write(loaded: LoadedModel, target: Path, args: argparse.Namespace) -> None:
    """Write one folder, and the files about it."""
    from isqtorch.app.card import CARD, card, is_ours

    assert loaded.report is not None
    check_output(target, args.model, force=args.force)  # again: quantizing may have taken an hour
    with one_line(target), replacing_folder(target, is_kept) as folder:
        loaded.save(folder)
        old = target / CARD
        if not (folder / CARD).exists() and (not os.path.lexists(old) or is_ours(old)):
            text = card(loaded.report, type(loaded.model).__name__, args.model, args.words)
            (folder / CARD).write_text(text, encoding="utf-8")
    if args.save_topology:
        loaded.report.topology().save(args.save_topology)
    if args.plot:
        loaded.report.plot(args.plot)


def check_parent(args: argparse.Namespace) -> None:
    """Refuse what several formats cannot share; OSError if the folder for their folders is a model itself."""
    for option in ("save_topology", "plot"):
        if getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')} is one file; give it with one format")
    check_place(args.output, args.model)
    if (args.output / "config.json").exists():
        raise FileExistsError(
            f"{args.output} is a model itself; with several formats it gets a folder for each: give a new one"
        )


def _check_format(args: argparse.Namespace, opened: Opened) -> None:
    """ValueError if there is no format, and no packed weights of another program to keep."""
    if args.isq is None and opened.checkpoint is None and not opened.is_decoded:
        if opened.quantized_by is not None:
            raise ValueError(f"{args.model} is quantized already by {opened.quantized_by}; give the original model")
        raise ValueError(f"{args.model} holds float weights: give --isq FORMAT, such as --isq q4k")


def _check_refine(args: argparse.Namespace, opened: Opened) -> None:
    """ValueError if --refine is given without what it needs."""
    if args.refine is None:
        return
    if args.refine < 1:
        raise ValueError(f"--refine must be 1 or more steps, got {args.refine}")
    if args.isq is None:
        raise ValueError("--refine needs --isq FORMAT: weights that are taken over have no float model to learn from")
    if not (args.calibration or args.calibration_file):
        raise ValueError("--refine needs a text to learn from: --calibration-file FILE, or --calibration self")
    opened.check("continues", "--refine")
    opened.check_tokenizer("--refine")


def refine(args: argparse.Namespace, loaded: LoadedModel) -> None:
    """Tune the packed model against the weights that it was loaded from; the report gets what came of it as a note."""
    from isqtorch.inplace.refine import refine_

    text = calibration_of(args.calibration) if args.calibration else Path(args.calibration_file)
    found = refine_(loaded.model, None, text=text, tokenizer=loaded.tokenizer, steps=args.refine)
    assert loaded.report is not None
    loaded.report.notes.append(str(found))


def check_files(*files: Path | None) -> None:
    """OSError if the folder of an output file does not exist: the files are written only at the end."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder {file.absolute().parent} for {file}")


def check_output(output: Path, model: str, *, force: bool) -> None:
    """OSError if writing would destroy anything that an earlier `isqtorch quantize` did not write."""
    check_place(output, model)
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{output} exists and is not an empty folder; give a new one, or --force to replace it")
    if not (output / "config.json").is_file():
        raise FileExistsError(f"{output} is not a model folder (it has no config.json), so --force does not replace it")
    quantization = read_json(output / "config.json").get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise FileExistsError(
            f"{output} holds a model that isqtorch did not write, so --force does not replace it; give a new folder"
        )
    odd = [path.name for path in output.iterdir() if not is_replaceable(path)]
    if odd:
        raise FileExistsError(
            f"{output} holds {first_names(sorted(odd))}, which isqtorch did not write; move this elsewhere, or give a new folder"
        )


def is_replaceable(path: Path) -> bool:
    """Whether an entry of the old folder can be replaced or kept: any file, and folders of a tokenizer or an embedder."""
    if path.is_symlink():
        return False
    known = path.name == _TEMPLATES or is_module(path.name)
    return path.is_file() or (known and path.is_dir() and all(map(is_replaceable, path.iterdir())))


def is_kept(path: Path) -> bool:
    """Whether a file of the old folder stays if the new model has none of that name: old weights would mislead readers."""
    return path.is_file() and not _WEIGHTS.fullmatch(path.name)


@contextmanager
def one_line(output: Path) -> Iterator[None]:
    """Turn errors of the libraries that write files into an OSError: both report a full disk as types of their own."""
    try:
        yield
    except Exception as error:
        if (
            not isinstance(error, SafetensorError) and type(error) is not Exception
        ):  # the latter is what tokenizers raises
            raise
        raise OSError(f"cannot write {output}: {error}") from error
