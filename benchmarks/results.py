"""What was measured, as plain data: it goes to the JSON file, and the tables are made from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

OURS, GGML, BF16, MEMORY = "isqtorch", "ggml", "bf16 F.linear", "memory"


@dataclass(frozen=True)
class Case:
    """One contender's line. Only cases of one group ran in turns, so only these are compared."""

    group: str
    who: str
    format: str = ""
    m: int = 0  # rows of x; 0 where there is no x
    path: str = ""  # which of several ways; for us the instruction-set level
    threads: int = 1
    median: float = 0.0  # seconds per call; CPU time on one thread, wall time on more
    best: float = 0.0
    nbytes: int = 0  # packed weight, or bytes read
    weights: int = 0  # N * K

    @property
    def gbytes(self) -> float:
        """Packed GB/s."""
        return self.nbytes / self.median / 1e9

    @property
    def tflops(self) -> float:
        return 2 * self.m * self.weights / self.median / 1e12

    @property
    def mweights(self) -> float:
        """Millions of weights per second."""
        return self.weights / self.median / 1e6


class Results:
    """All cases, what could not be measured and why, and facts about the machine."""

    def __init__(self, cases: Iterable[Case] = (), skipped: Iterable[str] = ()) -> None:
        self.cases = list(cases)
        self.skipped = list(skipped)
        self.identical: dict[str, bool] = {}  # group -> our packed bytes are the peer's
        self.facts: dict[str, Any] = {}

    def add(self, case: Case, median: float, best: float) -> None:
        self.cases.append(replace(case, median=median, best=best))

    def find(self, group: str, who: str, **wanted: object) -> Case | None:
        """The fastest case of that contender in the group; None if there is none."""
        return min(self._matching(group, who, wanted), key=lambda case: case.median, default=None)

    def _matching(self, group: str, who: str, wanted: dict[str, object]) -> Iterator[Case]:
        for case in self.cases:
            if case.group == group and case.who == who:
                if all(getattr(case, name) == value for name, value in wanted.items()):
                    yield case

    def groups(self, kind: str) -> list[str]:
        """Names of the groups that begin with that word, in the order they ran."""
        return list(dict.fromkeys(case.group for case in self.cases if case.group.split()[0] == kind))

    def to_json(self) -> dict[str, Any]:
        return {
            "facts": self.facts,
            "skipped": self.skipped,
            "identical": self.identical,
            "cases": [asdict(case) for case in self.cases],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        results = cls((Case(**case) for case in data["cases"]), data["skipped"])
        results.identical, results.facts = data["identical"], data["facts"]
        return results
