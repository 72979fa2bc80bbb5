"""The command line of the fuzzer; see the docstring of the package."""

from __future__ import annotations

import argparse
import os
import sys

from .driver import report, run
from .targets import SHARES, load
from .worker import run_one, seed_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, help="how many inputs, over all targets")
    parser.add_argument("--seconds", type=float, help="how long, at most")
    parser.add_argument("--base", type=int, default=0, help="another number gives other inputs")
    parser.add_argument("--target", action="append", help="this target alone; may be repeated")
    parser.add_argument("--only", type=int, help="run this input of the target, in this process")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    names = args.target or list(SHARES)
    if args.only is not None:
        target = load(names[0])
        print(repr(target.make(seed_of(names[0], args.base, args.only))))
        accepted, fault = run_one(target, seed_of(names[0], args.base, args.only))
        print(fault or ("accepted" if accepted else "refused"))
        return int(fault is not None)
    inputs = args.inputs if args.inputs or args.seconds else 1_000_000
    shares = {name: SHARES.get(name, 1) for name in names}
    return int(not report(run(shares, args.base, inputs, args.seconds or 1e9, args.jobs), args.base))


if __name__ == "__main__":
    sys.exit(main())
