"""Quantize a model and write it: packed weights in one safetensors file, configuration and tokenizer beside it.

    isqtorch quantize -m examples/demo_model/model --isq q4k -o demo-q4k
    isqtorch quantize -m ./my-model --isq 3 --imatrix my.imatrix --topology layers.yaml -o my-model-q3k

The folder is a model for `isqtorch perplexity`, and `isqtorch.checkpoint.load_` fills a model with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._common import add_imatrix, add_isq, add_json, add_model, add_policy, load_model

HELP = "quantize a model and write a packed checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_isq(parser, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    add_policy(parser)
    add_imatrix(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import checkpoint
    from ..formats import resolve_format
    from ..quantize import quantize_

    resolve_format(args.isq)  # before minutes of loading
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise FileExistsError(f"{args.output} exists and is not an empty folder; give a new one")
    model, tokenizer = load_model(args.model)
    report = quantize_(
        model,
        args.isq,
        topology=args.topology,
        organization=args.organization,
        imatrix=args.imatrix,
        fallback=args.fallback,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    for part in (model.config, getattr(model, "generation_config", None), tokenizer):
        if part is not None:
            part.save_pretrained(args.output)
    checkpoint.save(model, args.output / "model.safetensors")
    print(report.to_json() if args.json else report)
    print(f"wrote {args.output}", file=sys.stderr)
    return 0
