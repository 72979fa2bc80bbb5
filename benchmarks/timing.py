"""Rounds of several contenders in turn, so that what else happens on the machine hits all of them.

Two clocks run: the CPU time of the process, which a neighbour's work hardly changes and which on one thread is the time of the kernel,
and wall time, which is what several threads save.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spent:
    """Seconds per call."""

    cpu: float
    wall: float


@dataclass
class Samples:
    """Seconds per call, one entry per round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def add(self, spent: Spent) -> None:
        self.cpu.append(spent.cpu)
        self.wall.append(spent.wall)

    def seconds(self, threads: int) -> list[float]:
        """The clock that counts: CPU time on one thread, wall time on more."""
        return self.cpu if threads == 1 else self.wall

    def median(self, threads: int = 1) -> float:
        return statistics.median(self.seconds(threads))

    def best(self, threads: int = 1) -> float:
        return min(self.seconds(threads))


class Contender(Protocol):
    """Something that can be called again and again, here or in another process."""

    def run(self, calls: int) -> Spent: ...


def spend(call: Callable[[], object], calls: int) -> Spent:
    """Time `calls` calls together."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    return Spent((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)


def interleave(
    contenders: Mapping[Key, Contender],
    *,
    rounds: int,
    seconds: float,
    warm: bool = True,
    limit: float = math.inf,
) -> dict[Key, Samples]:
    """Give every contender its turn, `rounds` times.

    Args:
        contenders: by whatever names them.
        rounds: turns of each.
        seconds: length of a turn: as many calls as fit, at least one.
        warm: begin each turn with a call that is not timed, which brings the matrix back into the cache; a call that is as long
            as a turn does that by itself.
        limit: seconds for everything; fewer rounds, but at least three, keep to it.
    """
    calls, turns = {}, 0.0
    for key, contender in contenders.items():
        contender.run(1)
        once = max(contender.run(1).wall, 1e-7)
        calls[key] = max(1, round(seconds / once))
        turns += calls[key] * once
    rounds = max(min(rounds, 3), int(min(rounds, limit / turns)))
    samples: dict[Key, Samples] = {key: Samples() for key in contenders}
    for _ in range(rounds):
        for key, contender in contenders.items():
            if warm and calls[key] > 1:
                contender.run(1)
            samples[key].add(contender.run(calls[key]))
    return samples
