"""Write a model for another program: a GGUF file for llama.cpp, Ollama and LM Studio, or a folder for MLX.

    isqtorch export -m examples/demo_model/model --isq q4k --to gguf -o demo-q4k.gguf
    isqtorch export -m ./my-model-q4k --to gguf -o my-model-q4k.gguf        what isqtorch quantize wrote: the same bytes
    isqtorch export -m ./my-model --isq afq4 --to mlx -o my-model-mlx
    isqtorch export -m ./my-model --isq q4k_m --imatrix my.imatrix --to gguf -o my-model.gguf --force

Packed weights are written as they are, so the other program computes with the same numbers. Without --isq, the weights
stay as they are in MODEL. GGUF has the formats q*, iq* and mxfp4 of `isqtorch formats`, and MLX has afq* and mxfp4. The output
appears when it is complete. --force replaces a GGUF file by a GGUF file. It replaces nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from isqtorch.files.gguf import MAGIC
from isqtorch.files.writing import check_place, recover
from isqtorch.formats import mix_name, number_of_bits, resolve_format

from ._common import add_auto, add_device, add_importance, add_isq, add_model, add_policy, policy_options
from .quantize import one_line

if TYPE_CHECKING:
    from isqtorch.app.model import LoadedModel
    from isqtorch.integrations.opening import Opened

HELP = "write a model as a GGUF file, or as a folder for MLX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--to", choices=["gguf", "mlx"], required=True, help="the file format")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PATH", help="the file, or a new or empty folder for MLX"
    )
    parser.add_argument("--force", action="store_true", help="replace a GGUF file that is there")
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

    if args.to == "gguf" and number_of_bits(args.isq) is not None:
        args.isq = resolve_format(args.isq).name  # by name, layers that it does not fit get formats that GGUF has
    check, write = {"gguf": (_check_gguf, _write_gguf), "mlx": (_check_mlx, _write_mlx)}[args.to]
    options = policy_options(args)
    opened = check_request(args.model, args.isq, args.device, options)
    recover(args.output)
    check(args, opened)
    _check_weights(args, opened)
    loaded = LoadedModel(args.model, args.isq, opened=opened, device=args.device, options=options)
    check(args, opened)  # again: quantizing may have taken an hour
    write(args, loaded)
    if loaded.report is not None:
        print(loaded.report)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0


def _check_format(args: argparse.Namespace, program: str, known: list[str]) -> None:
    """ValueError if a format is asked for that the file cannot hold."""
    asked = [("--isq", args.isq)] if args.isq is not None and mix_name(args.isq) is None else []
    for option, spec in [*asked, *(("--choose-from", spec) for spec in args.choose_from or ())]:
        format = resolve_format(spec, args.device or "cpu").name
        if not any(format == name or format.startswith(f"{name}g") for name in known):
            raise ValueError(f"{option} {spec}: {program} has no {format}; it has {', '.join(known)}")


def _check_weights(args: argparse.Namespace, opened: Opened) -> None:
    """ValueError if a layer would get a format that the file cannot hold: by a mix, a promotion, a topology or a fallback."""
    from isqtorch.app.model import request_of
    from isqtorch.integrations.checkpoints.gguf import writer as gguf
    from isqtorch.integrations.checkpoints.mlx import writer as mlx
    from isqtorch.integrations.rehearsal import rehearsed

    model = rehearsed(opened, request_of(args.isq, policy_options(args)))
    if model is not None:
        {"gguf": gguf.check_weights, "mlx": mlx.check_weights}[args.to](model)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _check_gguf(args: argparse.Namespace, opened: Opened) -> None:
    """ValueError or OSError if the file could not be written, or would destroy anything but another GGUF file."""
    from isqtorch.integrations.checkpoints.gguf.outgoing import TYPES
    from isqtorch.integrations.checkpoints.gguf.writer import check_config

    check_config(opened.config.get_text_config())
    _check_format(args, "GGUF", list(TYPES))
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


def _write_gguf(args: argparse.Namespace, loaded: LoadedModel) -> None:
    from isqtorch.integrations.checkpoints.gguf.export import export_gguf

    tokenizer = loaded.opened.companions.tokenizer
    name = args.name or Path(args.model).name.removesuffix(".gguf")
    export_gguf(loaded.model, args.output, tokenizer, name=name, pre_tokenizer=args.pre_tokenizer)


# ---- MLX -------------------------------------------------------------------------------------------------------------


def _check_mlx(args: argparse.Namespace, opened: Opened) -> None:
    """ValueError or OSError if the folder could not be written, or would destroy anything."""
    from isqtorch.integrations.checkpoints.mlx.outgoing import known_formats
    from isqtorch.integrations.checkpoints.mlx.writer import check_config

    check_config(opened.config)
    _check_format(args, "MLX", known_formats())
    if args.name is not None or args.pre_tokenizer is not None:
        raise ValueError("--name and --pre-tokenizer are for --to gguf")
    check_place(args.output, args.model)
    if args.output.is_dir() and any(args.output.iterdir()):
        raise FileExistsError(f"{args.output} exists and is not an empty folder; give a new one")


def _write_mlx(args: argparse.Namespace, loaded: LoadedModel) -> None:
    from isqtorch.integrations.checkpoints.mlx.export import export_mlx

    companions = loaded.opened.companions
    with one_line(args.output):
        export_mlx(loaded.model, args.output, companions.processor or companions.tokenizer)
