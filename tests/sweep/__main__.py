"""Run the sweep: `python -m tests.sweep` for all types, `python -m tests.sweep llama bert` for some.

With `--resume FILE`, each result goes to a file at once, and a run that was stopped goes on where it was. Types that are
named are run again, and take the place of their old results.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: a forked process cannot use threads of its parent
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers.utils import logging

from isqtorch.files.writing import write_atomically

from .checks import Row, check_type
from .children import Limits, run
from .known import outdated, unknown
from .results import append, read
from .table import markdown

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("kinds", nargs="*", help="types of models; without any, all that transformers has")
    parser.add_argument("--sample", type=int, help="so many types, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=Limits().seconds, help="limit for one type")
    parser.add_argument("--gigabytes", type=float, default=Limits().gigabytes, help="limit of memory for one type")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="results so far; new ones are added to it")
    parser.add_argument("--output", type=Path, help=f"where the page goes; all types: {PAGE.name} in docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    everything = list(transformers.CONFIG_MAPPING)
    strange = sorted(set(options.kinds) - set(everything))
    if strange:
        parser.error(f"transformers {transformers.__version__} has no type {', '.join(strange)}")
    kinds = options.kinds or everything
    if options.sample is not None:
        kinds = random.Random(options.seed).sample(kinds, min(options.sample, len(kinds)))

    done = read(options.resume) if options.resume is not None else {}
    if not options.kinds:
        kinds = [kind for kind in kinds if kind not in done]
    began = time.monotonic()
    if len(kinds) > 1:
        with tempfile.TemporaryDirectory() as folder:
            check_type("llama", Path(folder))  # imports what every check needs: forked processes have it then
    for number, row in enumerate(run(kinds, check_type, Limits(options.seconds, options.gigabytes), options.jobs), 1):
        done[row.kind] = row
        if options.resume is not None:
            append(options.resume, row)
        print(f"{number:4}/{len(kinds)} {line(row)}", flush=True)
    rows = [done[kind] for kind in sorted(done)]

    failures, old = unknown(rows), outdated(rows)
    built = [row for row in rows if not row.not_built]
    print(f"\n{len(built)} types of {len(rows)} were built, in {time.monotonic() - began:.0f} s")
    for title, lines in (("failures", failures), ("entries of known.py that are not needed", old)):
        print(f"{title}: {len(lines)}", *lines, sep="\n  ")
    output = options.output or (PAGE if done.keys() == set(everything) else None)
    if output is not None:
        write_atomically(output, [markdown(rows, transformers.__version__).encode()])
        print(f"written: {output}")
    return 1 if failures or old else 0


def line(row: Row) -> str:
    """A row for the terminal."""
    if row.not_built:
        return f"{row.kind:28} not built: {row.not_built}"
    error = "" if row.error is None else f" error {row.error:.3f} of {row.bound:.3f}"
    head = f"{row.kind:28} {row.cls:40} {row.share:4.0%} {row.bits:5.2f} bits{error} {row.seconds:.1f} s"
    return "; ".join([head, *(f"FAILS {check}: {why}" for check, why in row.failures.items()), *row.remarks])


if __name__ == "__main__":
    sys.exit(main())
