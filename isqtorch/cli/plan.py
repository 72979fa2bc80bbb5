"""Say what quantizing a model would do, from its configuration and safetensors headers alone: no weight is read.

    isqtorch plan -m examples/demo_model/model --isq 4
    isqtorch plan -m ./my-model --isq q3k --topology layers.yaml --json

The options mean what they mean for `isqtorch quantize`.
"""

from __future__ import annotations

import argparse

from ._common import add_isq, add_json, add_model, add_policy

HELP = "what quantizing a model would do: sizes, promotions, fallbacks, skips"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_isq(parser, required=True)
    add_policy(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..plan import plan

    result = plan(args.model, args.isq, topology=args.topology, organization=args.organization, fallback=args.fallback)
    print(result.to_json() if args.json else result)
    return 0
