"""A target of the fuzzer that goes wrong in every way, for tests/test_fuzz.py."""

from __future__ import annotations

import os
import time

from fuzz.targets import Target


def run(kind: str) -> bool:
    if kind == "crash":
        os.abort()
    if kind == "hang":
        until = time.process_time() + 60
        while time.process_time() < until:
            pass
    if kind == "other":
        raise TypeError("no promised exception")
    if kind == "long":
        raise ValueError("x" * 1_000_000)
    if kind == "refused":
        raise ValueError("as promised")
    return True


TARGET = Target(lambda rng: rng.choice(("crash", "hang", "other", "long", "refused", "fine", "fine", "fine")), run)
