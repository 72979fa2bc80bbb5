"""Importance matrix files made to do harm: whatever the bytes are, a valid matrix or a ValueError, at once, in little memory."""

from __future__ import annotations

import random
import signal
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from imatrix_files import GGUF, LEGACY, PAIR, cimatrix, gguf

from isqtorch.importance.imatrix import read_imatrix

SEEDS = [LEGACY, GGUF, cimatrix({"model.layers.0.mlp.up_proj": [1.0] * 64, "x": [0.5] * 8}), gguf(PAIR)]
NUMBERS = (0, 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
MEMORY = 64 << 20
SECONDS = 10  # for one file; a few milliseconds are usual


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few random changes: bits, whole integers that mean something to a parser, cuts, insertions, repetitions, splices."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out)) if out else 0
        if rng.random() < 0.5:
            at %= 400  # where the headers are
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            raw = rng.choice((*NUMBERS, rng.randrange(2**16))).to_bytes(8, "little")[: rng.choice((4, 8))]
            out[at : at + len(raw)] = raw
        elif kind == 3:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
        elif kind == 5:
            out[at:at] = out[at : at + rng.randrange(1, 200)]
        elif kind == 6:
            out[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), -1.0, 3e38, -0.0, 1e-45)))
        else:
            other = rng.choice(SEEDS)
            out[at:] = other[rng.randrange(len(other)) :]
    return bytes(out)


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """TimeoutError where a hang would be."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time: a machine that others keep busy is no hang
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(cases: int, seed: int, folder: Path) -> int:
    """Read that many mutated files; how many are valid. A valid one is written in all formats and must come back the same."""
    rng = random.Random(seed)
    path = folder / "file"
    accepted = 0
    slowest = 0.0
    tracemalloc.start()  # sees Python's and numpy's memory; torch's tensors share numpy's here
    try:
        for case in range(cases):
            path.write_bytes(data := mutate(SEEDS[case % len(SEEDS)], rng))
            began = time.thread_time()
            try:
                with deadline(SECONDS):
                    imatrix = read_imatrix(path)
            except ValueError as error:
                assert str(path) in str(error) and len(str(error)) < 4000, data
            else:
                accepted += 1
                for name, values in imatrix.items():
                    assert name and torch.isfinite(values).all() and (values >= 0).all(), data
                if accepted % 10 == 0:
                    check_round_trip(path, folder)
            slowest = max(slowest, time.thread_time() - began)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{cases} files, {accepted} valid, peak {peak / 1e6:.1f} MB, slowest {1e3 * slowest:.0f} ms")
    assert peak < MEMORY, f"{peak} bytes for files of {len(GGUF)}"
    return accepted


def check_round_trip(path: Path, folder: Path) -> None:
    """What was accepted can be written as any kind of file, or is refused, and is read again; .cimatrix keeps names as well."""
    imatrix = read_imatrix(path)
    for suffix in (".gguf", ".imatrix", ".cimatrix"):
        try:
            imatrix.save(folder / f"x{suffix}")
        except ValueError as error:
            assert any(text in str(error) for text in ("63 bytes", "has data", "too large"))
            continue
        again = read_imatrix(folder / f"x{suffix}")
        for name in again if suffix == ".cimatrix" else ():
            want, counts = imatrix[name].flatten(), imatrix.counts[name]
            seen = (counts > 0).repeat_interleave(want.numel() // len(counts))
            assert torch.equal(again[name], torch.where(seen, want, 0))


def test_mutated(tmp_path: Path) -> None:
    assert 0 < fuzz(3000, 7, tmp_path) < 3000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_hundred_thousand_mutated(seed: int, tmp_path: Path) -> None:
    assert 0 < fuzz(12_800, 1000 + seed, tmp_path) < 12_800
