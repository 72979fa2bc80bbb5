"""One peer's process: reads requests, one JSON object per line, and answers each with one. The other end is `process.py`.

python -m benchmarks.peers.worker ggml
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .. import workloads
from ..timing import spend
from . import Peer, Product, Unavailable, module


class Worker:
    """Holds what was prepared, by the number that the other end gave it."""

    def __init__(self, name: str) -> None:
        self._module = module(name)
        self._peer: Peer = self._module.open()
        self._calls: dict[int, Callable[[], object]] = {}
        self._weights: dict[tuple[int, int], workloads.Array] = {}
        self._exact: dict[tuple[int, int, int], workloads.Array] = {}

    def hello(self) -> dict[str, Any]:
        return {"version": self._peer.version, "formats": list(self._module.FORMATS)}

    def paths(self, fmt: str) -> dict[str, Any]:
        return {"paths": list(self._peer.paths(fmt))}

    def linear(
        self, key: int, fmt: str, path: str, n: int, k: int, m: int, copies: int, threads: int
    ) -> dict[str, Any]:
        """Prepare a product and say how far it is from the unquantized one."""
        weight, x = self._weight(n, k), workloads.activations(m, k)
        product: Product = self._peer.linear(fmt, path, weight, x, copies=copies, threads=threads)
        product()
        error = workloads.relative_error(product.result(), self._product(n, k, m))
        self._calls[key] = product
        return {"nbytes": product.nbytes, "error": error}

    def quantize(self, key: int, fmt: str, n: int, k: int, important: bool) -> dict[str, Any]:
        """Prepare a quantization and give the hash of its bytes."""
        weight = self._weight(n, k)
        vector = workloads.importance(k) if important else None
        quantize = self._peer.quantize  # type: ignore[attr-defined]  # of the peers, only ggml's is compared
        packed = quantize(fmt, weight, vector)
        self._calls[key] = lambda: quantize(fmt, weight, vector)
        return {"nbytes": packed.nbytes, "sha256": hashlib.sha256(packed.tobytes()).hexdigest()}

    def run(self, key: int, calls: int) -> dict[str, Any]:
        call = self._calls[key]
        prepare = getattr(call, "prepare", None)
        if prepare:
            prepare()
        return asdict(spend(call, calls))

    def drop(self) -> dict[str, Any]:
        """Free what was prepared; weights stay for the next."""
        self._calls.clear()
        return {}

    def _weight(self, n: int, k: int) -> workloads.Array:
        if (n, k) not in self._weights:
            self._weights = {(n, k): workloads.weight(n, k)}  # one at a time: memory is for the copies
            self._exact.clear()
        return self._weights[n, k]

    def _product(self, n: int, k: int, m: int) -> workloads.Array:
        if (n, k, m) not in self._exact:
            self._exact[n, k, m] = workloads.activations(m, k) @ self._weight(n, k).T
        return self._exact[n, k, m]


def serve(open: Callable[[], Any]) -> int:
    """Answer requests with the methods of what `open` gives; the first answer is that of `hello`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like to standard output
    try:
        worker = open()
        answers.write(json.dumps(worker.hello()) + "\n")
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(worker, request.pop("do"))(**request)
            except Unavailable as reason:
                answer = {"unavailable": str(reason)}
            answers.write(json.dumps(answer) + "\n")
    except Unavailable as reason:
        answers.write(json.dumps({"unavailable": str(reason)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(serve(lambda: Worker(sys.argv[1])))
