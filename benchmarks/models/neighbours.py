"""How much of the machine others took while something ran: what they slow down should not be compared.

Libraries suffer differently: threads that wait for each other by spinning, as llama.cpp's do, can be a hundred times as slow where another
program takes a core.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

_STAT = Path("/proc/stat")
_BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; idle and iowait are not


class Neighbours:
    """Watches a block in which one process is meant to have the machine for itself.

    Attributes:
        share: of all cores' time, what went neither to that process nor to nobody; None where the system does not tell.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.share: float | None = None

    def __enter__(self) -> Neighbours:
        self._before = self._clocks()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        now = self._clocks()
        if now and self._before:
            wall, busy, own = (after - before for after, before in zip(now, self._before, strict=True))
            self.share = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    def _clocks(self) -> tuple[float, float, float] | None:
        """Seconds: wall, of all cores busy, of the process."""
        tick = os.sysconf("SC_CLK_TCK")
        try:
            total = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
            own = Path(f"/proc/{self._pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return None  # not Linux
        return time.perf_counter(), sum(int(total[i]) for i in _BUSY) / tick, (int(own[11]) + int(own[12])) / tick
