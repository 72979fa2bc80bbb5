"""Write a model for another program: a GGUF file for llama.cpp, Ollama and LM Studio.

    isqtorch export -m examples/demo_model/model --isq q4k --to gguf -o demo-q4k.gguf
    isqtorch export -m ./my-model-q4k --to gguf -o my-model-q4k.gguf        what isqtorch quantize wrote: the same bytes
    isqtorch export -m ./my-model --isq q4k_m --imatrix my.imatrix --to gguf -o my-model.gguf --force

Packed weights are written as they are, so the other program computes with the same numbers. Without --isq, the weights
stay as they are in MODEL. The file appears when it is complete. --force replaces a GGUF file, and no file of another kind.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isqtorch.files.gguf import MAGIC
from isqtorch.files.writing import recover
from isqtorch.formats import mix_name, resolve_format

from ._common import add_auto, add_device, add_importance, add_isq, add_model, add_policy, policy_options

if TYPE_CHECKING:
    from isqtorch.integrations.opening import Opened

HELP = "write a model as a GGUF file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--to", choices=["gguf"], required=True, help="the file format")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help="the file")
    parser.add_argument("--force", action="store_true", help="replace an output that is there")
    add_isq(parser, required=False)
    parser.add_argument("--name", help="GGUF: the name of the model that programs show (default: that of MODEL)")
    parser.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="GGUF: llama.cpp's name of the rule by which the tokenizer splits text, where it is not found",
    )
    add_policy(parser)
    add_importance(parser)
    add_auto(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from isqtorch.app.model import LoadedModel, check_request

    check, write = {"gguf": (_check_gguf, _write_gguf)}[args.to]
    options = policy_options(args)
    opened = check_request(args.model, args.isq, args.device, options)
    recover(args.output)
    check(args, opened)
    loaded = LoadedModel(args.model, args.isq, opened=opened, device=args.device, options=options)
    check(args, opened)  # again: quantizing may have taken an hour
    write(args, loaded)
    if loaded.report is not None:
        print(loaded.report)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _check_gguf(args: argparse.Namespace, opened: Opened) -> None:
    """ValueError or OSError if the file could not be written, or would destroy anything but another GGUF file."""
    from isqtorch.integrations.checkpoints.gguf.export import check_config
    from isqtorch.integrations.checkpoints.gguf.outgoing import TYPES

    check_config(opened.config.get_text_config())
    if args.isq is not None and mix_name(args.isq) is None:
        format = resolve_format(args.isq, args.device or "cpu").name
        if format not in TYPES:
            raise ValueError(f"--isq {args.isq}: GGUF has no {format}; it has {', '.join(TYPES)}")
    output: Path = args.output
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {output.absolute().parent} for {output}")
    _check_apart(output, args.model)
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_file():
        raise FileExistsError(f"{output} exists and is not a file; give another name")
    if not args.force:
        raise FileExistsError(f"{output} exists; give another name, or --force to replace it")
    with open(output, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise FileExistsError(f"{output} is not a GGUF file, so --force does not replace it; give another name")


def _check_apart(output: Path, model: str) -> None:
    """OSError if the output is the model, or lies in its folder."""
    if os.path.exists(model):
        source, place = Path(model).resolve(), output.resolve()
        if place == source or (output.exists() and place.samefile(source)):
            raise FileExistsError(f"{output} is the model itself; give another name")
        if source.is_dir() and source in place.parents:
            raise FileExistsError(f"{output} lies in the folder of the model {model}; give a place beside it")


def _write_gguf(args: argparse.Namespace, loaded: Any) -> None:
    from isqtorch.integrations.checkpoints.gguf.export import export_gguf

    tokenizer = loaded.opened.companions.tokenizer
    name = args.name or Path(args.model).name.removesuffix(".gguf")
    export_gguf(loaded.model, args.output, tokenizer, name=name, pre_tokenizer=args.pre_tokenizer)
