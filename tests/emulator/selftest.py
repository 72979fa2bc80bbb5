"""Runs cases of selftest.cu and prints what came out, as JSON: `selftest.py LIBRARY ORDER LATE CASE...`."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

LARGEST = 1024  # floats


def run(library: ctypes.CDLL, case: str, order: int = 0, late: bool = True) -> tuple[str, list[float]]:
    """The error and the output of one case."""
    library.selftest.restype = ctypes.c_char_p
    library.emulator_options(order, 7, 0, int(late))
    out = (ctypes.c_float * LARGEST)()
    error = library.selftest(case.encode(), out).decode()
    return error, list(out)


if __name__ == "__main__":
    loaded = ctypes.CDLL(str(Path(sys.argv[1]).resolve()))
    results = {case: run(loaded, case, int(sys.argv[2]), sys.argv[3] == "1") for case in sys.argv[4:]}
    print(json.dumps(results))
