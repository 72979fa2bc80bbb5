"""How long a call takes on a GPU: a CUDA graph of many calls, replayed, so that starting them from Python does not count."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]


class Clock(Protocol):
    """Measures calls that do the same with different copies of their data."""

    def seconds(self, calls: Sequence[Call]) -> float:
        """The median time of one call."""


class GraphClock:
    """Captures rounds of the calls into one graph and times its replays with events.

    Args:
        replay: seconds that a replay should take at least; events count half microseconds.
        rounds: replays.
    """

    def __init__(self, replay: float = 2e-3, rounds: int = 15) -> None:
        self._replay, self._rounds = replay, rounds

    def seconds(self, calls: Sequence[Call]) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what happens at a first call must not be captured
            for call in calls:
                call()
            once = self._events(lambda: [call() for call in calls]) / len(calls)
        torch.cuda.current_stream().wait_stream(stream)
        laps = max(1, round(self._replay / (once * len(calls))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(laps):
                for call in calls:
                    call()
        graph.replay()
        times = [self._events(graph.replay) for _ in range(self._rounds)]
        return statistics.median(times) / (laps * len(calls))

    @staticmethod
    def _events(work: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class EventClock(GraphClock):
    """Without a graph, for work that cannot be captured: quantizing waits for the device."""

    def seconds(self, calls: Sequence[Call]) -> float:
        for call in calls:
            call()
        return statistics.median(self._events(call) for _ in range(self._rounds) for call in calls)
