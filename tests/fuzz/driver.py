"""Runs targets in processes, several at a time, and reports what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .mutate import FOLDER, new_folder
from .targets import SLOW
from .worker import PLACE, STARTING

HANG = 1.0  # seconds of processor time for one input; milliseconds are usual
STUCK = 30.0  # seconds of any kind for one input: it waits for something
START = 120.0  # seconds until the first input
MOST_ENDS = 20  # crashes and hangs after which a target is given up
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """What came of one target.

    Attributes:
        faults: first line of a fault without its numbers -> (how often, the first input, the whole text).
    """

    target: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    faults: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, number: int, fault: str) -> None:
        key = fault.partition(": ")[0]
        count, first, text = self.faults.get(key, (0, number, fault))
        self.faults[key] = (count + 1, first, text)

    @property
    def summary(self) -> str:
        found = sum(count for count, _, _ in self.faults.values())
        return (
            f"{self.target:12} {self.inputs:8} inputs, {self.accepted:8} accepted, {self.refused:8} refused, {found:6} findings of "
            f"{len(self.faults)} kinds, {self.seconds:5.0f} s"
        )


def run(shares: dict[str, int], base: int, inputs: int | None, seconds: float, jobs: int) -> list[Result]:
    """Divide the inputs, or the seconds, among the targets. Both are upper limits."""
    total = sum(shares.values())
    with ThreadPoolExecutor(jobs) as pool:
        began = [
            pool.submit(
                run_target,
                name,
                base,
                0,
                10**12 if inputs is None else -(-inputs * share // total),
                seconds * jobs / len(shares),
            )
            for name, share in shares.items()
        ]
        return [future.result() for future in began]


def run_target(name: str, base: int, first: int, end: int, seconds: float) -> Result:
    """Run inputs first .. end - 1 of a target. After a crash or a hang, go on with the next input."""
    result, began, ends = Result(name), time.monotonic(), 0
    while first < end and ends < MOST_ENDS:
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            break
        number, how = _one_process(result, name, base, first, end, left)
        result.inputs += number - first
        first = number
        if how is None:
            break
        result.inputs += 1
        result.add(number, how)
        first += 1
        ends += 1
    result.seconds = time.monotonic() - began
    return result


def _one_process(result: Result, name: str, base: int, first: int, end: int, seconds: float) -> tuple[int, str | None]:
    """Returns the number of the last input, and how the process ended there, or None if it ended well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    paths = [str(REPOSITORY / "tests"), *sys.path, str(REPOSITORY)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with (
        new_folder() as folder,
        tempfile.NamedTemporaryFile() as place,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        environment[FOLDER] = folder
        place.write(PLACE.pack(STARTING, 0, 0, False))
        place.flush()
        command = [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", name, str(base), str(first), str(end),
                   str(seconds), place.name]  # fmt: skip
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=REPOSITORY)
        try:
            how = _watched(process, Path(place.name), SLOW.get(name, HANG))
        finally:
            process.kill()
            process.wait()
        number, accepted, refused, _ = PLACE.unpack(Path(place.name).read_bytes())
        out.seek(0)
        for line in out.read().decode().splitlines():
            said = json.loads(line)
            result.add(said["number"], said["fault"])
        if how is not None:
            err.seek(0)
            how += f": {err.read().decode(errors='replace')[-1500:]}"
        result.accepted += accepted
        result.refused += refused
        return (first if number == STARTING else number), how


def _watched(process: subprocess.Popen[bytes], place: Path, most: float) -> str | None:
    """Wait for the end of a worker, or for a hang: more than so many seconds of work for one input."""
    seen, since, used = STARTING, time.monotonic(), 0.0
    while True:
        try:
            status = process.wait(0.1)
        except subprocess.TimeoutExpired:
            pass
        else:
            return None if status == 0 else f"the process ended with status {status}"
        number, _, _, running = PLACE.unpack(place.read_bytes())
        try:
            times = psutil.Process(process.pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        now, processor = time.monotonic(), times.user + times.system
        if number != seen:
            seen, since, used = number, now, processor
        elif now - since > (STUCK if running else START):
            return f"no answer after {now - since:.0f} s"
        elif running and processor - used > most:
            return f"hang after {most:.0f} s of work"


def report(results: Iterable[Result], base: int) -> bool:
    """Print findings and counts. Returns whether there is no finding."""
    results = list(results)
    for result in results:
        for count, number, text in result.faults.values():
            print(f"\nFINDING in {result.target}, {count} times, first in input {number}: {text}")
            print(f"  again: PYTHONPATH=.:tests python -m fuzz --base {base} --target {result.target} --only {number}")
    print()
    for result in results:
        print(result.summary)
    print(f"{sum(result.inputs for result in results)} inputs, {sum(len(r.faults) for r in results)} kinds of findings")
    return not any(result.faults for result in results)
