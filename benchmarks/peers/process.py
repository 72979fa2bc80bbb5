"""Peers in processes of their own, from the side of the report."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..timing import Spent
from . import Unavailable, module

ROOT = Path(__file__).resolve().parents[2]


def _death(code: int) -> str:
    """What the exit status of a process says."""
    if code >= 0:
        return f"its process ended with status {code}"
    name = signal.Signals(-code).name
    hint = "; GCC 12 compiles ggml's AMX code wrongly, clang does not" if name == "SIGILL" else ""
    return f"its process died of {name}{hint}"


class Remote:
    """One prepared product or quantization, as a contender."""

    def __init__(self, process: PeerProcess, key: int, nbytes: int, facts: dict[str, Any]) -> None:
        self._process, self._key, self.nbytes, self.facts = process, key, nbytes, facts

    def run(self, calls: int) -> Spent:
        return Spent(**self._process.ask("run", key=self._key, calls=calls))


class Process:
    """A process that answers requests, each one JSON object on a line; `worker.serve` is its other end.

    Attributes:
        name: for messages.
        hello, version: what it said of itself when it started.

    Raises:
        Unavailable: it does not start, and why.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str | None] | None = None,
        errors: int | None = None,
    ) -> None:
        self.name, self._command, self._errors = name, command, errors
        variables = {**os.environ, **(environment or {})}
        self._environment = {key: value for key, value in variables.items() if value is not None}  # None: not set
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env=self._environment,
        )
        self.hello = self._answer()
        self.version: str = self.hello["version"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            Unavailable: the peer says no, or dies of it.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        except BrokenPipeError:
            pass  # the missing answer says it
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"{self.name}: {_death(self._process.wait())}")
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()


class PeerProcess(Process):
    """A peer, started.

    Args:
        name: its module in this package.
        environment: variables for it alone, such as ISQTORCH_GGML_LIB of another build.
        python: which one runs it; default ISQTORCH_PEERS_PYTHON, which may have the peers installed, or this one.

    Raises:
        Unavailable: it is not installed, or does not start.
    """

    def __init__(self, name: str, environment: dict[str, str] | None = None, python: str = "") -> None:
        python = python or os.environ.get("ISQTORCH_PEERS_PYTHON", sys.executable)
        self._keys = itertools.count()
        self._broken: set[str] = set()  # paths that the process dies of
        command = [python, "-m", f"{__package__}.worker", name]
        super().__init__(module(name).NAME, command, environment, subprocess.DEVNULL)

    def _start(self) -> None:
        super()._start()
        self.formats: list[str] = self.hello["formats"]

    def probe(self, fmt: str) -> list[str]:
        """Try every path on a small product. Paths that kill the process are not used again; returns what happened to them."""
        found = []
        for path in self.paths(fmt):
            try:
                self.linear(fmt, path, (512, 512), 32)
                self.drop()
            except Unavailable as reason:
                if self._process.poll() is not None:
                    self._broken.add(path)
                    found.append(f"{reason}, on its path {path}")
                    self._start()
        return found

    def paths(self, fmt: str) -> list[str]:
        return [path for path in self.ask("paths", fmt=fmt)["paths"] if path not in self._broken]

    def linear(
        self, fmt: str, path: str, shape: tuple[int, int], m: int, *, copies: int = 1, threads: int = 1
    ) -> Remote:
        """A product, prepared there. `facts["error"]` is its distance from the unquantized product."""
        key = next(self._keys)
        facts = self.ask(
            "linear", key=key, fmt=fmt, path=path, n=shape[0], k=shape[1], m=m, copies=copies, threads=threads
        )
        return Remote(self, key, facts["nbytes"], facts)

    def quantize(self, fmt: str, shape: tuple[int, int], *, important: bool) -> Remote:
        """A quantization on one thread, prepared there. `facts["sha256"]` is that of the bytes."""
        key = next(self._keys)
        facts = self.ask("quantize", key=key, fmt=fmt, n=shape[0], k=shape[1], important=important)
        return Remote(self, key, facts["nbytes"], facts)

    def drop(self) -> None:
        """Free what was prepared."""
        self.ask("drop")
