"""How much longer error feedback takes than packing with an importance matrix: a table in Markdown.

    python -m benchmarks.bench_feedback --formats q4_0 q8_0 --shape 1024 2048

One weight of random numbers on one thread, with the moments of made-up inputs. Both choose their scales by the same rule.
Each number is the median of some calls.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import isqtorch  # noqa: F401  (the operators)
from isqtorch.formats import formats, get_format
from isqtorch.quantizers import feedback_factor, scale_rule
from isqtorch.text import markdown_table

CALLS = 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(formats()), metavar="NAME", help="default: all")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        default=[1024, 2048],
        metavar=("N", "K"),
        help="of the weight; default: %(default)s",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    headers = ["format", "importance, ns/weight", "feedback, ns/weight", "ratio"]
    print(markdown_table(headers, measure(args.formats, *args.shape), right=(1, 2, 3)))
    return 0


def measure(names: list[str], rows: int, columns: int) -> list[list[str]]:
    """One row of the table for each format."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(2 * columns, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
    moments = x.t() @ x / len(x)
    weight = torch.randn(rows, columns, generator=generator)
    factor, importance = feedback_factor(moments), moments.diagonal().contiguous()
    quantize, feed = torch.ops.isqtorch.quantize, torch.ops.isqtorch.quantize_feedback
    table = []
    for name in names:
        rule = scale_rule(get_format(name))
        alone = _median(partial(quantize, weight, name, importance, rule))
        fed = _median(partial(feed, weight, name, factor, importance, rule))
        each = 1e9 / weight.numel()
        table.append([name, f"{alone * each:.1f}", f"{fed * each:.0f}", f"{fed / alone:.0f}"])
    return table


def _median(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    call()
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    raise SystemExit(main())
