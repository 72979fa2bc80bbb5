"""Options of the commands that quantize: an importance matrix from a file, or collected from a text first."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_importance(parser: argparse.ArgumentParser) -> None:
    """`--imatrix FILE` or `--calibration-file FILE`."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--imatrix", metavar="FILE", help="importance matrix: .imatrix, .gguf or .cimatrix")
    either.add_argument(
        "--calibration-file",
        metavar="FILE",
        help="UTF-8 text to collect an importance matrix from before quantizing (`isqtorch imatrix` also saves it)",
    )


def importance_options(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The keyword arguments of `quantize_` and `requantize_` for these options."""
    if args.calibration_file:
        return {"calibration_file": Path(args.calibration_file), "tokenizer": tokenizer}
    return {"imatrix": args.imatrix}
