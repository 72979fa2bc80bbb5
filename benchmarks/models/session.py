"""Runs the measurements of whole models.

Every library and format has a process of its own, so that memory is that of one load. Those of a group then stay, and generate in
turns: what else happens on the machine hits all alike. A group is one of our formats, in all libraries that have it; the last one is
what other libraries have instead. bf16 takes part in every group, and so does a loop that reads memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..peers import Unavailable
from ..peers.process import Process
from .checkpoints import checkpoint, original
from .engines import BF16, ENVIRONMENT, FORMATS, ISQTORCH, LLAMA_CPPS, TRANSFORMERS, same_formats
from .neighbours import Neighbours
from .results import ModelResults, Run
from .targets import PROMPTS

_UNRELATED = 0.9  # logits this far from those of the bf16 model are not those of the same model
_SLOW = 2.0  # seconds for the new tokens of one turn: slower libraries get fewer
_FEWEST = 3
_LONG = 5.0  # seconds of generating in a round: who takes longer has one round
_LOADING = 4.0  # seconds of loading and quantizing: slower formats do it twice, others more often
_AGAIN = 1.5  # seconds of loading of other libraries: slower ones do it once, others three times
_OTHERS = "other libraries"  # the last group
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # of the one who started this; see ENVIRONMENT


@dataclass
class Contender:
    """A run, the process that has its model loaded, and what it was loaded from."""

    run: Run
    process: Process
    new: int  # tokens of one turn
    long: bool = False  # it had a round, and that took long


class Session:
    """Measures models and collects what they give.

    Args:
        cache: folder for checkpoints, which stay there.
        rounds: turns of each contender.
        new: tokens that each generates in a turn.
        python: which one runs other libraries.
    """

    def __init__(self, cache: Path, *, rounds: int, new: int, python: str = sys.executable) -> None:
        self.cache, self.rounds, self.new, self.python = cache, rounds, new, python
        self.results = ModelResults()
        command = [sys.executable, "-m", f"{__package__}.reader"]
        self._reader = Process("memory", command, dict.fromkeys(_VARIABLES))
        self.results.facts["reader"] = self._reader.version

    def close(self) -> None:
        """End the process that reads memory."""
        self._reader.close()

    def model(self, name: str, formats: list[str], *, peers: bool) -> None:
        """Everything about one checkpoint: bf16, our formats, other libraries."""
        began, label = time.perf_counter(), name.partition("-")[0]
        source = checkpoint(name, self.cache)
        self._say(f"{name}: checkpoint in {source}", began)
        with tempfile.TemporaryDirectory(prefix="saved-", dir=self.cache) as saved:
            for group, runs in self.groups(label, formats, peers=peers).items():
                self._group([Run(label, who, fmt, group) for who, fmt in runs], source, name, Path(saved))
        self._say(f"{name}: done", began)

    @staticmethod
    def groups(label: str, formats: list[str], *, peers: bool) -> dict[str, list[tuple[str, str]]]:
        """Libraries and formats that take turns."""
        plain, found = (TRANSFORMERS, BF16), {}
        for fmt in formats:
            others = same_formats(label, fmt) if peers else []
            found[fmt] = [plain, *((who, fmt) for who in (ISQTORCH, *others))]
        if peers:
            found[_OTHERS] = [plain, *((who, fmt) for who, theirs in FORMATS.items() for fmt in theirs)]
        return found

    def _group(self, runs: list[Run], source: Path, name: str, work: Path) -> None:
        """Load all of a group, let them generate in turns, and end their processes."""
        contenders: list[Contender] = []
        try:
            for run in runs:
                self._enter(contenders, run, work / run.format if run.who in LLAMA_CPPS else source, name, work)
            self._turns(contenders)
        finally:
            for contender in contenders:
                contender.process.close()

    def overhead(self, formats: list[str]) -> None:
        """What a layer costs beside its operator."""
        process = self._start(ISQTORCH)
        for fmt in formats:
            self.results.overhead[fmt] = process.ask("overhead", fmt=fmt, rounds=60)
        process.close()

    def _start(self, who: str) -> Process:
        """A fresh process. What other libraries have to say besides their answers is not shown."""
        ours = who in (ISQTORCH, TRANSFORMERS)
        command = [sys.executable if ours else self.python, "-m", f"{__package__}.worker", who]
        environment = {**dict.fromkeys(_VARIABLES), **ENVIRONMENT.get(who, {})}
        return Process(who, command, environment, errors=None if ours else subprocess.DEVNULL)

    def _enter(self, contenders: list[Contender], run: Run, source: Path, name: str, work: Path) -> None:
        """Load one contender and measure that; what it cannot do is noted, and costs its own row only."""
        began = time.perf_counter()
        try:
            process = self._start(run.who)
        except Unavailable as reason:
            self._skip(run.who, str(reason))
            return
        self.results.facts.setdefault("versions", {})[run.who] = process.version
        try:
            self._load(run, process, source, name, work)
            run.error = self._check(run, process, source, work)
            new = self._tokens(process)
            if run.who == ISQTORCH:
                run.token_bytes = process.ask("token_bytes", prompt=min(PROMPTS))["bytes"]
            elif run.who in LLAMA_CPPS and (ours := self.results.beside(run, ISQTORCH)):
                run.token_bytes = ours.token_bytes  # they are the same bytes
            contenders.append(Contender(run, process, new))
            self.results.runs.append(run)
            self._say(f"{run.model} {run.who} {run.format}: loaded in {run.load[0]:.1f} s", began)
        except Unavailable as reason:
            process.close()
            self._skip(f"{run.model} {run.who} {run.format}", str(reason))

    def _load(self, run: Run, process: Process, source: Path, name: str, work: Path) -> None:
        prepared = process.ask("prepare", folder=str(source), fmt=run.format)["source"]
        loaded = process.ask("load", source=prepared, fmt=run.format)
        run.size, run.peak, run.kept = loaded["size"], loaded["peak"], loaded["kept"]
        run.load.append(loaded["seconds"])
        if run.who != ISQTORCH:
            while len(run.load) < 3 and max(run.load) < _AGAIN:
                run.load.append(process.ask("load", source=prepared, fmt=run.format)["seconds"])
            return
        file = original(name)
        for _ in range(3 if file else 0):
            run.load_gguf.append(process.ask("load", source=str(file), fmt=run.format)["seconds"])
        began = time.perf_counter()
        while len(run.load) < 2 or (len(run.load) < 4 and time.perf_counter() - began < _LOADING):
            # in turns with loading, whose bound they are
            run.read.append(process.ask("read", folder=prepared)["seconds"])
            run.quantize.append(process.ask("quantize")["seconds"])
            run.load.append(process.ask("load", source=prepared, fmt=run.format)["seconds"])
        self._reload(run, process, work / run.format)

    def _reload(self, run: Run, process: Process, folder: Path) -> None:
        """Save what is loaded, and load that in a fresh process."""
        process.ask("save", folder=str(folder))
        fresh = self._start(ISQTORCH)
        try:
            loaded = fresh.ask("load", source=str(folder), fmt="")
            run.reload.append(loaded["seconds"])
            run.reload_peak = loaded["peak"]
            run.identical = fresh.ask("digest") == process.ask("digest")
        finally:
            fresh.close()

    def _check(self, run: Run, process: Process, source: Path, work: Path) -> float | None:
        """The distance of the logits from the bf16 model's; None where one of them gives none.

        Raises:
            Unavailable: they are not those of this model.
        """
        path = work / f"{run.who}-{run.format}.npy"
        vocabulary = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        known = process.ask("logits", vocabulary=vocabulary, to=str(path))["known"]
        exact = work / f"{TRANSFORMERS}-{BF16}.npy"
        if not known or not exact.exists():
            return None
        got, want = np.load(path), np.load(exact)
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        if not error < _UNRELATED:
            raise Unavailable(f"its logits are off by {error:.2f}: it computes something else, and is not timed")
        return error

    def _tokens(self, process: Process) -> int:
        """How many tokens are a turn of it; the first run of a prompt, which is slower, is done with that."""
        prompt, most = max(PROMPTS), self.new
        spent = process.ask("generate", prompt=prompt, new=_FEWEST)
        return max(_FEWEST, min(most, int(_SLOW * (_FEWEST - 1) / spent["rest"])))

    def _turns(self, contenders: list[Contender]) -> None:
        for _ in range(self.rounds):
            bandwidth = self._reader.ask("read")["rate"]
            for contender in contenders:
                run, began = contender.run, time.perf_counter()
                run.bandwidth.append(bandwidth)
                with Neighbours(contender.process.pid) as others:
                    for prompt in PROMPTS:
                        new = contender.new if prompt == PROMPTS[0] else 1
                        spent = contender.process.ask("generate", prompt=prompt, new=new)
                        run.prefill.setdefault(str(prompt), []).append(spent["first"])
                        if new > 1:
                            run.decode.append(spent["rest"] / (new - 1))
                if others.share is not None:
                    run.others.append(others.share)
                contender.long = time.perf_counter() - began > _LONG
            contenders = [contender for contender in contenders if not contender.long]

    def _skip(self, what: str, why: str) -> None:
        if self.results.skipped.setdefault(what, why) == why:
            print(f"skipped: {what}: {why}", flush=True)

    @staticmethod
    def _say(what: str, began: float) -> None:
        print(f"{what} ({time.perf_counter() - began:.0f} s)", flush=True)
