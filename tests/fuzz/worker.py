"""One process that runs inputs of one target. It tells the driver where it is through shared memory.

Findings go to stdout, one JSON object a line.
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random

import psutil

from .targets import Target, load

PLACE = struct.Struct("<qqqq")  # number of the input, accepted, refused, and whether the input is running
STARTING = -1
LEAST = 2.0  # seconds of work, however long the imports took


def seed_of(target: str, base: int, number: int) -> Random:
    """The generator of one input: the same in every process, on every machine."""
    return Random(f"{target}:{base}:{number}")


def run_one(target: Target, rng: Random) -> tuple[bool, str | None]:
    """Run one input. Returns whether it was accepted, and what is wrong, if anything is."""
    made = None
    try:
        made = target.make(rng)
        return target.run(made) is not False, None
    except target.promised as error:
        if len(str(error)) > 20_000:
            return False, f"a message of {len(str(error))} characters: {str(error)[:200]!r}\n{made!r:.2000}"
        return False, None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/isqtorch/" in f.filename] or list(frames)
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return False, f"{type(error).__name__} at {where}: {str(error)[:300]}\n{made!r:.2000}"


def main(name: str, base: int, first: int, end: int, seconds: float, place: str) -> None:
    target = load(name)
    warnings.simplefilter("ignore")
    accepted, refused = 0, 0
    until = time.monotonic() + max(seconds - (time.time() - psutil.Process().create_time()), LEAST)
    with Path(place).open("r+b") as file, mmap.mmap(file.fileno(), PLACE.size) as shared:
        number = first
        while number < end and time.monotonic() < until:
            shared[:] = PLACE.pack(number, accepted, refused, True)
            ok, fault = run_one(target, seed_of(name, base, number))
            accepted += ok
            refused += not ok and fault is None
            if fault is not None:
                print(json.dumps({"number": number, "fault": fault}), flush=True)
            number += 1
        shared[:] = PLACE.pack(number, accepted, refused, False)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]), sys.argv[6])
