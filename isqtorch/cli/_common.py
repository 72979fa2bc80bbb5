"""Shared code of the commands: common arguments, loading a model, reading a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from isqtorch.files import binary
from isqtorch.integrations.classes import Need

_AUTO = {"target_bpw": "target_bpw", "max_size": "max_size", "choose_from": "formats", "probe": "probe"}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        required=True,
        help="a folder with config.json and safetensors, a .gguf file, an MLX folder, an id on the Hub, or owner/name:file.gguf there",
    )


def add_isq(parser: argparse.ArgumentParser, *, required: bool, several: bool = False) -> None:
    more = "; several with commas between them" if several else ""
    parser.add_argument(
        "--isq",
        required=required,
        metavar="FORMAT",
        help="bits (2 3 4 5 6 8: the best format for the device), a name (`isqtorch formats` lists them), a mix (q4k_m), auto, or keep"
        + more,
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The options of `quantize_` that decide which layer gets which format."""
    parser.add_argument("--topology", metavar="FILE", help="YAML file with a format per layer, range or /regex/")
    parser.add_argument(
        "--organization", choices=["default", "moqe"], default="default", help="moqe: quantize only the experts"
    )
    parser.add_argument(
        "--fallback",
        choices=["up", "skip", "error"],
        default="up",
        help="where a format's blocks do not divide a layer: a larger format, leave the layer, or stop",
    )
    parser.add_argument(
        "--activations",
        choices=["fp8"],
        help="let linear layers in fp8 round their inputs to FP8, too, where that is faster",
    )


def add_importance(parser: argparse.ArgumentParser) -> None:
    """`--rule`, and `--imatrix FILE` or `--calibration-file FILE`."""
    parser.add_argument(
        "--rule",
        metavar="RULE",
        help="search: a slower, closer fit of afq and hqq, which also uses importance; mlx: MLX's afq bits; feedback: about half "
        "the divergence at the same size, with --calibration-file, or with moments as --imatrix",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="with --rule feedback: most memory for moments, such as 6GB; the text is read as often as needed (default: half of "
        "what is free)",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--imatrix", metavar="FILE", help="importance matrix: .imatrix, .gguf or .cimatrix; or moments: .safetensors"
    )
    either.add_argument(
        "--calibration",
        metavar="TEXT",
        help="self: the model writes a text and is calibrated on it before it is quantized; or a file, as --calibration-file",
    )
    either.add_argument(
        "--calibration-file",
        metavar="FILE",
        help="UTF-8 text to collect an importance matrix from before quantizing (`isqtorch imatrix` also saves it)",
    )


def add_auto(parser: argparse.ArgumentParser) -> None:
    """The options of `--isq auto`."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--target-bpw", type=float, metavar="BITS", help="with --isq auto: bits per weight of the model"
    )
    either.add_argument("--max-size", metavar="SIZE", help="with --isq auto: 6GB, 5.5GiB, or a number of bytes")
    parser.add_argument("--choose-from", nargs="+", metavar="FORMAT", help="with --isq auto: the formats allowed")
    parser.add_argument(
        "--probe",
        choices=["kl", "output"],
        help="with --isq auto: what to measure; default: kl, the curvature of the divergence, with a calibration file",
    )


def policy_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_policy`, `add_importance` and `add_auto`, for `LoadedModel`."""
    options = {name: getattr(args, name) for name in ("topology", "organization", "fallback", "imatrix", "rule")}
    if args.max_memory:
        options["max_memory"] = int(args.max_memory) if args.max_memory.isdecimal() else args.max_memory
    if args.activations:
        options["activations"] = args.activations
    for option, name in _AUTO.items():
        value = getattr(args, option, None)
        if value is not None:
            options[name] = int(value) if option == "max_size" and value.isdecimal() else value
    if args.calibration:
        options["calibration_file"] = calibration_of(args.calibration)
    if args.calibration_file:
        options["calibration_file"] = Path(args.calibration_file)
    return options


def calibration_of(text: str) -> str | Path:
    """The value of `calibration`: "self", or the path of a file."""
    from isqtorch.importance.windows import is_self

    return text if is_self(text) else Path(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="where the model runs: cpu, cuda, mps (default: the CPU, which has kernels of its own)"
    )


def add_kv(parser: argparse.ArgumentParser) -> None:
    """`--kv`."""
    parser.add_argument(
        "--kv",
        metavar="FORMAT",
        help="keys and values of the context: q8_0 (8), q5_1 (5), q4_0 (4), q5_0, q4_1, iq4_nl, or keys/values, as q8_0/q4_0; "
        "default: floats",
    )


def kv_of(args: argparse.Namespace) -> tuple[str, str] | None:
    """The formats that `--kv` names, keys first; None: floats."""
    from isqtorch.formats.kv import kv_formats

    if args.kv is None:
        return None
    try:
        return kv_formats(args.kv)
    except ValueError as error:
        raise ValueError(f"--kv: {error}") from error


def add_details(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--details", action="store_true", help="print a line for every layer")


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def load_model(model: str, need: Need, command: str) -> tuple[Any, Any]:
    """A model as in its checkpoint, in evaluation mode, and its tokenizer, which the command needs."""
    from isqtorch.app.model import LoadedModel, check_request

    opened = check_request(model, None)
    opened.check(need, command)
    opened.check_tokenizer(command)
    loaded = LoadedModel(model, opened=opened)
    return loaded.model, loaded.tokenizer


def read_text(path: str) -> str:
    """The contents of a UTF-8 text file; ValueError if it is not UTF-8 or has no text."""
    text = binary.read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
