"""The memory of this process, as Linux tells it, and the most it takes while something runs."""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from isqtorch.app.benchmark import peak_resident_bytes

STATUS = Path("/proc/self/status")
_FIELDS = {"VmRSS": "total", "RssAnon": "anonymous"}
_INTERVAL = 0.003  # seconds between samples


def resident() -> dict[str, int]:
    """Bytes in memory: `total`, and `anonymous`, which are not pages of a file; empty where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return {}
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for key, name in _FIELDS.items()}


class Peak:
    """Watches memory in a block.

    Attributes:
        peak: the most bytes over what there was at the start, by the names of `resident`.
        kept: the bytes over it at the end.
    """

    def __enter__(self) -> Peak:
        gc.collect()
        self._exact = _forget_peak()
        self._before = resident()
        self._most, self._running = dict(self._before), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._running = False
        self._thread.join()
        self._sample()
        if self._exact:
            self._most["total"] = max(self._most["total"], peak_resident_bytes())
        now = resident()
        self.peak = {name: value - self._before[name] for name, value in self._most.items()}
        self.kept = {name: value - self._before[name] for name, value in now.items()}

    def _watch(self) -> None:
        while self._running:
            self._sample()
            time.sleep(_INTERVAL)

    def _sample(self) -> None:
        for name, value in resident().items():
            self._most[name] = max(self._most[name], value)


def _forget_peak() -> bool:
    """Let the kernel count the peak of `total` anew: it misses nothing between two samples. False where it may not."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
