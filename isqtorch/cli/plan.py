"""Predict what quantizing a model does, from its configuration and the headers of its files only: no weight is read.

    isqtorch plan -m examples/demo_model/model                     the size in every format, and whether it fits
    isqtorch plan -m examples/demo_model/model --isq 4             the layers, similar ones in one line
    isqtorch plan -m examples/demo_model/model --isq 4 --details   every layer
    isqtorch plan -m ./my-model --recommend                        what to take for the memory that is free, and the command
    isqtorch plan -m ./my-model --recommend --memory 8GB           the same for another machine
    isqtorch plan -m ./my-model --isq q3k --topology layers.yaml --json
    isqtorch plan -m ./my-model --context 32768
    isqtorch plan -m my-model.gguf                                 what packing its weights anew would give
    isqtorch plan -m ./my-model --isq q4k_m --plot bits.png

A model fits into a memory if its weights and the key-value cache of one sequence are not larger than what is free now.
Loading and running need a little more. The options are those of `isqtorch quantize`.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from isqtorch.policy.options import RULES
from isqtorch.text import text_table

from ._common import add_details, add_isq, add_json, add_model, add_policy

if TYPE_CHECKING:
    from isqtorch.report.fit import Overview

HELP = "what quantizing a model would do: sizes, fit, promotions, fallbacks, skips"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_isq(parser, required=False)
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens of the cache (%(default)s)")
    add_policy(parser)
    parser.add_argument("--rule", metavar="RULE", help="as for quantize; no rule changes a size")
    parser.add_argument("--plot", metavar="PNG", help="with --isq: draw the bits of every layer (needs matplotlib)")
    parser.add_argument(
        "--recommend", action="store_true", help="say what to take for the memory at hand, and the command to type"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="with --recommend: fit into 8GB, say, instead of what is free here"
    )
    parser.add_argument("--device", help="with --recommend: cpu, cuda:1, mps (default: a GPU if there is one)")
    add_details(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from isqtorch.report.fit import overview

    if args.recommend:
        from .recommending import run as recommend

        return recommend(args)
    for option in ("memory", "device"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} is for --recommend")
    if args.rule is not None and args.rule not in RULES:
        raise ValueError(f"--rule must be one of {', '.join(RULES)}; got {args.rule!r:.80}")
    if args.plot and args.isq is None:
        raise ValueError("--plot draws one format: it needs --isq FORMAT")
    options = {"topology": args.topology, "organization": args.organization, "fallback": args.fallback}
    if args.isq is not None:
        options["activations"] = args.activations
    elif args.activations:
        raise ValueError("--activations needs --isq FORMAT")
    found = overview(args.model, None if args.isq is None else [args.isq], context=args.context, **options)
    if args.isq is None:
        print(json.dumps(found.to_dict(), indent=2) if args.json else _table(found))
        return 0
    (report,) = found.reports.values()
    report.notes += found.notes
    if args.plot:
        report.plot(args.plot)
    if args.json:
        fit = {"context": found.context, "cache_bytes": found.cache_bytes, "fits": found.fits(report.bytes_after)}
        print(json.dumps({**report.to_dict(), **fit}, indent=2))
    else:
        print(report.details() if args.details else report)
        print("\n".join(["", *_fit(found, report.bytes_after)]))
    return 0


def _table(found: Overview) -> str:
    from isqtorch.text import human_size

    names = [memory.name for memory in found.memories]
    headers = ["format", "size", "of now", "bits/weight", "fallbacks", "left", *(f"fits {name}" for name in names)]
    rows = [["as it is", human_size(found.bytes_now), "100.0 %", "", "", "", *_yes_no(found, found.bytes_now)]]
    for name, report in sorted(found.reports.items(), key=lambda item: -item[1].bytes_after):
        size = 100 * report.bytes_after / found.bytes_now if found.bytes_now else 100.0
        counts = [str(len(report.fallbacks)), str(len(report.left))]
        rows.append(
            [
                name,
                human_size(report.bytes_after),
                f"{size:.1f} %",
                f"{report.bits_per_weight:.2f}",
                *counts,
                *_yes_no(found, report.bytes_after),
            ]
        )
    return "\n".join([text_table(headers, rows, right=range(1, 6)), "", *_footing(found)])


def _yes_no(found: Overview, weights: int) -> list[str]:
    return ["yes" if fits else "no" for fits in found.fits(weights).values()]


def _fit(found: Overview, weights: int) -> list[str]:
    where = "; ".join(f"{name}: {'fits' if fits else 'does not fit'}" for name, fits in found.fits(weights).items())
    return [where, *_footing(found, notes=False)]


def _footing(found: Overview, *, notes: bool = True) -> list[str]:
    from isqtorch.text import human_size

    memory = ", ".join(f"{m.name} {human_size(m.free)} free of {human_size(m.total)}" for m in found.memories)
    cache = [] if found.cache_bytes is None else [f"cache of {found.context} tokens: {human_size(found.cache_bytes)}"]
    return ["; ".join([memory, *cache]), *(f"note: {note}" for note in (found.notes if notes else []))]
