"""Measure the perplexity of a model on a text, and how much quantization changes its predictions.

    isqtorch perplexity examples/demo_model/model --text examples/demo_model/heldout.txt
    isqtorch perplexity examples/demo_model/model --isq q4k --kl --text examples/demo_model/heldout.txt
    isqtorch perplexity -m ./my-model-q4k --text my.txt --mode llamacpp --json

--kl compares with MODEL as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ._common import add_auto, add_importance, add_isq, add_json, add_policy, policy_options, read_text
from .parser import Parser

HELP = "perplexity and KL divergence on a text"


def add_arguments(parser: Parser) -> None:
    parser.add_model_first()
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    add_isq(parser, required=False)
    add_policy(parser)
    add_importance(parser)
    add_auto(parser)
    parser.add_argument("--kl", action="store_true", help="with --isq: also the divergence from the unquantized model")
    parser.add_argument("--context", type=int, default=512, help="tokens per window (%(default)s)")
    parser.add_argument(
        "--mode",
        choices=["global", "llamacpp"],
        default="global",
        help="llamacpp: score the second half of each window",
    )
    parser.add_argument("--tokens", type=int, help="use only the first so many tokens of the text")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.kl and not args.isq:
        raise ValueError("--kl needs --isq FORMAT")
    from isqtorch.app.model import LoadedModel, check_request
    from isqtorch.evaluation import kl_divergence, perplexity

    options = policy_options(args)
    opened = check_request(args.model, args.isq, options=options)
    opened.check("continues", "perplexity")
    opened.check_tokenizer("perplexity")
    text = read_text(args.text)
    tokenizer = opened.companions.tokenizer
    ids = tokenizer(text, verbose=False)["input_ids"][: args.tokens]
    model = LoadedModel(args.model, args.isq, opened=opened, options=options).model
    reference = LoadedModel(args.model, opened=opened).model if args.kl else None
    score = perplexity(model, ids, tokenizer, context=args.context, mode=args.mode, progress=sys.stderr.isatty())
    result: dict[str, Any] = {
        "model": args.model,
        "format": args.isq,
        "mode": args.mode,
        "context": args.context,
        "tokens": score.tokens,
        "perplexity": float(score),
        "perplexity_stderr": score.stderr,
    }
    if reference is not None:
        divergence = kl_divergence(model, reference, ids, tokenizer, context=args.context, progress=sys.stderr.isatty())
        result |= {"kl_mean": divergence.mean, "kl_p99": divergence.p99, "top1_agreement": divergence.top1_agreement}
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"perplexity {score!r}")
    if reference is not None:
        print(divergence)
    return 0
