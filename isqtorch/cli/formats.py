"""List every format: its block layout, the formula of a weight, and its size.

    isqtorch formats
    isqtorch formats --variants          other group sizes and scale types too
    isqtorch formats --markdown          the table of the README and docs/formats.md
    isqtorch formats --json | jq .q4k

Bits per weight include scales; "importance" says whether an importance matrix is used.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from isqtorch.formats import QuantFormat, formats, get_format
from isqtorch.text import markdown_table, text_table

from ._common import add_json

HELP = "list the formats"
_HEADERS = (
    "format",
    "bits/weight",
    "block",
    "bytes",
    "block layout",
    "a weight is",
    "importance",
    "falls back to",
    "promoted to",
)
_RIGHT = (1, 2, 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", action="store_true", help="also other group sizes and scale types")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_json(group)


def run(args: argparse.Namespace) -> int:
    entries = [get_format(name) for name in formats(variants=args.variants)]
    if args.json:
        print(json.dumps({fmt.name: format_facts(fmt) for fmt in entries}, indent=2))
    elif args.markdown:
        print(markdown(entries))
    else:
        print(text_table(_HEADERS, [_row(fmt) for fmt in entries], right=_RIGHT))
    return 0


def format_facts(fmt: QuantFormat) -> dict[str, Any]:
    """The facts about a format, for `--json`."""
    return {
        "bits_per_weight": fmt.bits_per_weight,
        "block": fmt.block,
        "block_bytes": fmt.block_bytes,
        "layout": fmt.layout,
        "formula": fmt.formula,
        "importance": fmt.takes_importance,
        "fallback": fmt.fallback,
        "promoted": fmt.promoted,
        "aliases": list(fmt.aliases),
        "source": fmt.source,
    }


def markdown(entries: list[QuantFormat] | None = None) -> str:
    """The generated table of the documentation."""
    entries = entries or [get_format(name) for name in formats()]
    rows = []
    for fmt in entries:
        row = _row(fmt)
        for column in (0, 4, 5):
            row[column] = f"`{row[column]}`"
        rows.append([cell.replace("|", "\\|") for cell in row])
    return markdown_table(_HEADERS, rows, right=_RIGHT)


def _row(fmt: QuantFormat) -> list[str]:
    return [
        fmt.name,
        f"{fmt.bits_per_weight:g}",
        str(fmt.block),
        str(fmt.block_bytes),
        fmt.layout,
        fmt.formula,
        "yes" if fmt.takes_importance else "no",
        fmt.fallback or "-",
        fmt.promoted or "-",
    ]
