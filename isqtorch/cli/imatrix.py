"""Collect an importance matrix: run a text through a model and sum up the squared inputs of each layer.

    isqtorch imatrix examples/demo_model/model examples/demo_model/calibration.txt -o demo.gguf
    isqtorch imatrix -m ./my-model my.txt -o my.imatrix --max-tokens 30000
    isqtorch imatrix -m ./my-model my.txt -o my.safetensors            second moments, for --rule feedback
    isqtorch imatrix -m ./my-model --calibration self -o my.gguf       from a text that the model writes

The extension of OUT selects the file format: .gguf and .imatrix (or .dat) of llama.cpp, .cimatrix of mistral.rs. With
.safetensors it holds the second moments of all inputs, from which --rule feedback chooses better codes; they take
gigabytes for a large model. Every command with --imatrix reads all of them. A text of 10,000 to 50,000 tokens is
enough, if it is similar to what the model will process.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ._common import add_json, calibration_of, load_model, read_text
from .parser import Parser

HELP = "collect an importance matrix from a text"


def add_arguments(parser: Parser) -> None:
    parser.add_model_first()
    text = parser.add_argument("text", metavar="TEXT", help="UTF-8 text file; not with --calibration")
    parser.instead.append((text, r"--calibration(?:=|$)"))
    parser.add_argument(
        "--calibration", metavar="TEXT", help="self: the model writes the text; or a UTF-8 text file, as TEXT"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help=".gguf, .imatrix, .cimatrix; or .safetensors for moments",
    )
    parser.add_argument("--chunk", type=int, default=512, help="tokens per chunk (%(default)s)")
    parser.add_argument("--max-tokens", type=int, help="use only the first so many tokens of the text")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from isqtorch.importance.calibration import collect_imatrix
    from isqtorch.importance.imatrix import check_extension
    from isqtorch.importance.moments_files import is_name
    from isqtorch.importance.passes import collect_moments

    whole = is_name(args.output)
    if not whole:
        check_extension(args.output)  # before minutes of work
    if not args.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {args.output.absolute().parent} for {args.output}")
    text = Path(args.text) if args.calibration is None else calibration_of(args.calibration)
    if isinstance(text, Path):
        read_text(str(text))
        model, tokenizer = load_model(args.model, "reads", "imatrix")
    else:
        model, tokenizer = load_model(args.model, "continues", "imatrix --calibration self")
    collect = collect_moments if whole else collect_imatrix
    im = collect(model, text, tokenizer, chunk=args.chunk, max_tokens=args.max_tokens)
    im.save(args.output)
    unseen = sum(im.unseen.values())
    if args.json:
        facts = {
            "output": str(args.output),
            "entries": len(im),
            "tokens": im.tokens,
            "chunk_count": im.chunk_count,
            "chunk_size": im.chunk_size,
            "experts_without_data": unseen,
        }
        print(json.dumps(facts, indent=2))
        return 0
    print(im.summary())
    if unseen:
        print(f"{unseen} expert matrices saw no token; a longer text may reach them")
    print(f"wrote {args.output}", file=sys.stderr)
    return 0
