"""A process that reads memory in turns with the models: the speed that no token can exceed.

python -m benchmarks.models.reader
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..bandwidth import Bandwidth
from ..peers.worker import serve

_BUFFER = 1 << 29  # bytes: more than caches hold
_CALLS = 4  # each reads a quarter of it


class Reader:
    """Reads a buffer with as many threads as torch has."""

    def __init__(self) -> None:
        bandwidth = Bandwidth(torch.ones(_BUFFER, dtype=torch.uint8))
        self._method = bandwidth.method
        self._stream = bandwidth.stream(threads=torch.get_num_threads())

    def hello(self) -> dict[str, Any]:
        return {"version": self._method}

    def read(self) -> dict[str, Any]:
        """Bytes per second."""
        return {"rate": self._stream.nbytes / self._stream.run(_CALLS).wall}


if __name__ == "__main__":
    sys.exit(serve(Reader))
