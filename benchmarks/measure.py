"""The measurements of one report: for every format a few groups of contenders that run in turns.

dram q4k       M=1, copies of the weight rotate through memory: a plain read, we, ggml
hot q4k        M=1 and 8, one matrix: we, ggml on every path, and for formats that ggml lacks one of ours that it has
many q4k       M=128 and 512: we, bf16 F.linear, ggml on every path
tier q4k avx2  the same with both sides kept to an older instruction set
threads ...    one and two threads, wall time
quantize q4k   one thread: we, ggml, without and with importance
peer nf4       other libraries' formats at all M, beside our format of that size
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from isqtorch import formats, get_format, ops

from . import workloads
from .bandwidth import Bandwidth
from .ours import Here, check_linear, linear_call, rotation
from .peers import Unavailable
from .peers.ggml import TAKES_NOT
from .peers.process import PeerProcess
from .results import BF16, GGML, MEMORY, OURS, Case, Results
from .timing import Contender, interleave

SHAPE = (4096, 4096)  # one shape for the targets; bench_ops.py has more
QUANTIZED_ROWS = 256  # of a matrix to quantize: about a million weights
FEW, MANY = (1, 8), (128, 512)
IN_CORE = 1 << 20
TOO_LONG = 0.5  # seconds for a call of another library
HOPELESS = 1.5  # a path of ggml's this much slower than its best at M=128 is not tried at M=512


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds of every group, and seconds of one turn."""

    few: int = 15
    many: int = 7
    turn: float = 0.01
    limit: float = 3.0  # seconds for the contenders of one group and M; fewer rounds keep to it


@dataclass(frozen=True)
class Tier:
    """An instruction set that both sides are kept to, by a build of ggml and by a process of ours; None for this process."""

    name: str
    ggml: PeerProcess | None
    ours: PeerProcess | None = None


Cases = dict[Case, Contender]


class Session:
    """Runs the groups and collects what they give."""

    def __init__(self, budget: Budget, tiers: list[Tier]) -> None:
        self.budget, self.tiers = budget, tiers  # the first is this machine's best
        self.ggml = tiers[0].ggml
        self.results = Results()
        self.isa = ops.cpu_info().isa_selected
        self._weight = torch.from_numpy(workloads.weight(*SHAPE))  # f32 [N, K]
        self._weight_bf16 = self._weight.bfloat16()
        self._arena = torch.empty(workloads.DRAM_BYTES + (1 << 26), dtype=torch.uint8)
        self.bandwidth = Bandwidth(torch.ones(workloads.DRAM_BYTES, dtype=torch.uint8))
        self.pace = {name: _pace(name) for name in formats() if not name.startswith("q")}
        self.results.facts["tiers"] = {}

    # ---- groups ------------------------------------------------------------------------------------------------------

    def format(self, name: str) -> None:
        """All groups of one of our formats."""
        began = time.perf_counter()
        packed = ops.quantize(self._weight, name)
        for m in (*FEW, *MANY):
            check_linear(self._x(m), packed, name)
        best = self.hot(name, packed)
        self.dram(name, packed, best)
        for tier in self.tiers:
            self.many(name, packed, tier)
        self.threads(name, packed)
        self.quantize(name)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)

    def hot(self, name: str, packed: Tensor) -> str | None:
        """Few rows, one matrix. Returns ggml's best path at one row."""
        group = f"hot {name}"
        cases: Cases = {}
        for m in FEW:
            cases |= self._ours(group, name, m, [packed])
            cases |= self._ggml(group, name, m, self.ggml)
        if name in self.pace:
            base = self.pace[name]
            cases |= self._ours(group, base, 1, [ops.quantize(self._weight, base)])
        self._run(cases, self.budget.few)
        found = self.results.find(group, GGML, m=1)
        return found.path if found else None

    def dram(self, name: str, packed: Tensor, path: str | None) -> None:
        """One row, weights from memory, beside a plain read of memory."""
        group = f"dram {name}"
        stream = self.bandwidth.stream()
        cases: Cases = {Case(group, MEMORY, path=self.bandwidth.method, nbytes=stream.nbytes): stream}
        cases |= self._ours(group, name, 1, rotation(packed, self._arena))
        if path:
            cases |= self._ggml(group, name, 1, self.ggml, [path], workloads.copies_for(packed.nbytes, "dram"))
        self._run(cases, self.budget.few, warm=False, stretch=3)

    def many(self, name: str, packed: Tensor, tier: Tier) -> None:
        """Many rows; the first tier, this machine's best, also meets bf16 F.linear."""
        best = tier is self.tiers[0]
        group = f"many {name}" if best else f"tier {name} {tier.name}"
        if not best and (tier.ggml is None or name not in tier.ggml.formats):
            return
        self.results.facts["tiers"][group] = tier.name
        paths = None
        for m in MANY:
            cases = self._ggml(group, name, m, tier.ggml, paths)
            if tier.ours:
                (level,) = tier.ours.paths(name)
                remote = tier.ours.linear(name, level, SHAPE, m)
                cases[self._case(group, OURS, name, m, level, remote.nbytes)] = remote
            else:
                cases |= self._ours(group, name, m, [packed]) | self._bf16(group, m)
            self._run(cases, self.budget.many)
            paths = self._promising(group, m)

    def threads(self, name: str, packed: Tensor) -> None:
        """Two threads over one, where computing is the work: many rows, and the quantizer.

        Beside them a loop without any shared work says what the machine had to give: on a busy one that is less than 2.
        """
        many, rows = MANY[-1], self._weight[:QUANTIZED_ROWS]
        product, quantize = linear_call(self._x(many), [packed], name), partial(ops.quantize, rows, name)
        for label, m, job in ((f"M={many}", many, product), ("quantize", 0, quantize)):
            group = f"threads {name} {label}"
            weights = self._weight.numel() if m else rows.numel()
            case = Case(group, OURS, name, m, self.isa, nbytes=packed.nbytes, weights=weights)
            cases: Cases = {}
            for threads in (1, 2):
                loop = self.bandwidth.cached(IN_CORE, threads=threads)
                cases[replace(case, threads=threads)] = Here(job, threads=threads)
                cases[Case(group, MEMORY, path="loop", threads=threads, nbytes=loop.nbytes)] = loop
            self._run(cases, self.budget.many, wall=True)

    def quantize(self, name: str) -> None:
        """A quantizer on one thread, and ggml's; what both make should be the same."""
        group, shape = f"quantize {name}", (QUANTIZED_ROWS, SHAPE[1])
        weight = torch.from_numpy(workloads.weight(*shape))
        vector = torch.from_numpy(workloads.importance(shape[1]))
        for variant, given in (("plain", None), ("importance", vector)):
            if given is not None and not get_format(name).takes_importance:
                continue
            packed = ops.quantize(weight, name, given)
            case = Case(group, OURS, name, path=variant, nbytes=packed.nbytes, weights=weight.numel())
            cases: Cases = {case: Here(partial(ops.quantize, weight, name, given))}
            if self.ggml and name in self.ggml.formats:
                try:
                    remote = self.ggml.quantize(name, shape, important=given is not None)
                    cases[replace(case, who=GGML)] = remote
                    same = remote.facts["sha256"] == hashlib.sha256(packed.numpy().tobytes()).hexdigest()
                    self.results.identical[f"{group} {variant}"] = same
                except Unavailable as reason:
                    self._skip(f"{group}: {reason}")
            self._run(cases, self.budget.many)

    def peer(self, peer: PeerProcess, fmt: str) -> None:
        """Another library's format, one matrix hot, beside bf16 F.linear and our format of that size."""
        like = fmt if fmt in formats() else {"int8": "q8_0"}.get(fmt, "q4k")
        packed = ops.quantize(self._weight, like)
        group = f"peer {peer.name} {fmt}"
        pace: dict[str, float] = {}  # seconds per row of x, by path
        for m in (*FEW, *MANY):
            cases: Cases = {}
            for path in peer.paths(fmt):
                if pace.get(path, 0) * m > TOO_LONG:
                    self._skip(f"{peer.name} {fmt} {path}, M={m}: a call would take {pace[path] * m:.1f} s")
                    continue
                try:
                    remote = peer.linear(fmt, path, SHAPE, m)
                    cases[self._case(group, peer.name, fmt, m, path, remote.nbytes)] = remote
                except Unavailable as reason:
                    self._skip(f"{peer.name} {fmt} {path}: {reason}")
            if not cases:
                return
            self._run(cases | self._ours(group, like, m, [packed]) | self._bf16(group, m), min(3, self.budget.many))
            pace = {case.path: case.best / m for case in self.results.cases if case.group == group and case.m == m}
            peer.drop()

    def roofline(self) -> None:
        """Memory and cache read bandwidth, and bf16 F.linear at its best."""
        size = get_format("q4_0").row_bytes(SHAPE[1]) * SHAPE[0]
        for threads in (1, 2):
            memory, hot = self.bandwidth.stream(threads=threads), self.bandwidth.cached(size, threads=threads)
            for group, stream in (("read from memory", memory), ("read hot, as much as a q4_0 matrix", hot)):
                case = Case(group, MEMORY, path=self.bandwidth.method, threads=threads, nbytes=stream.nbytes)
                self._run({case: stream}, self.budget.few, wall=threads > 1)
            for m in (512, 2048):
                self._run(self._bf16("peak", m, threads), self.budget.many, wall=threads > 1)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes():
            process.close()

    # ---- contenders --------------------------------------------------------------------------------------------------

    def _x(self, m: int) -> Tensor:
        return torch.from_numpy(workloads.activations(m, SHAPE[1])).bfloat16()

    def _case(self, group: str, who: str, name: str, m: int, path: str, nbytes: int, threads: int = 1) -> Case:
        return Case(group, who, name, m, path, threads, nbytes=nbytes, weights=self._weight.numel())

    def _ours(self, group: str, name: str, m: int, copies: list[Tensor]) -> Cases:
        nbytes = copies[0].nbytes
        case = self._case(group, OURS, name, m, self.isa, nbytes)
        return {case: Here(linear_call(self._x(m), copies, name))}

    def _bf16(self, group: str, m: int, threads: int = 1) -> Cases:
        x, w = self._x(m), self._weight_bf16
        case = self._case(group, BF16, "bf16", m, "oneDNN", w.nbytes, threads)
        return {case: Here(lambda: torch_linear(x, w), threads=threads)}

    def _ggml(
        self, group: str, name: str, m: int, peer: PeerProcess | None, paths: list[str] | None = None, copies: int = 1
    ) -> Cases:
        cases: Cases = {}
        if peer is None or name not in peer.formats:
            return cases
        for path in paths or peer.paths(name):
            try:
                remote = peer.linear(name, path, SHAPE, m, copies=copies)
            except Unavailable as reason:
                if str(reason) != TAKES_NOT:
                    self._skip(f"{group} M={m}, ggml {path}: {reason}")
                continue
            cases[self._case(group, GGML, name, m, path, remote.nbytes)] = remote
        return cases

    def _promising(self, group: str, m: int) -> list[str] | None:
        best = self.results.find(group, GGML, m=m)
        if best is None:
            return None
        cases = [case for case in self.results.cases if case.group == group and case.who == GGML and case.m == m]
        return [case.path for case in cases if case.median < HOPELESS * best.median]

    # ---- running -----------------------------------------------------------------------------------------------------

    def _skip(self, reason: str) -> None:
        if reason not in self.results.skipped:
            self.results.skipped.append(reason)
            print(f"skipped: {reason}", flush=True)

    def _run(
        self, cases: Mapping[Case, Contender], rounds: int, *, warm: bool = True, wall: bool = False, stretch: int = 1
    ) -> None:
        samples = interleave(
            cases, rounds=rounds, seconds=stretch * self.budget.turn, warm=warm, limit=self.budget.limit
        )
        for case, times in samples.items():
            threads = 2 if wall else case.threads
            self.results.add(case, times.median(threads), times.best(threads))
        for process in self._processes():
            process.drop()

    def _processes(self) -> list[PeerProcess]:
        return [process for tier in self.tiers for process in (tier.ggml, tier.ours) if process]


def _pace(name: str) -> str:
    """The format whose packed GB/s is the measure of one that ggml lacks: both decode to the same kind of numbers."""
    return "q8_0" if get_format(name).bits == 8 else "q4_0"
