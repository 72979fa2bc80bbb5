"""What was measured of whole models, as plain data: it goes to the JSON file, and the tables are made from nothing else."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from .engines import ISQTORCH

OTHERS = 0.1  # of all cores' time; where other programs took more, speeds say nothing


@dataclass
class Run:
    """One model in one format of one library. Memory is in bytes over the process after its imports; times are wall seconds.

    Attributes:
        model: first word of the checkpoint's name.
        group: the turns that it took part in; only what ran in turns is compared.
        size: bytes of the weights in memory.
        load: seconds of loading, quantizing included, of each time; `peak` and `kept` are of the first.
        load_gguf: the same from the GGUF file that the checkpoint was made of.
        peak, kept: memory `total` and `anonymous`, the most while loading and that afterwards; empty where it is not known.
        read, quantize: seconds to read the checkpoint's files, and to quantize its matrices with nothing else to do.
        reload: the same as `load` and `peak` for the saved packed checkpoint; `identical` whether its weights are the same bits.
        error: distance of the logits from those of the bf16 model.
        prefill: by tokens of the prompt, seconds until the first new token.
        others: by round, the share of the machine that other programs took while this one generated.
        decode: seconds per token after the shortest of these prompts.
        bandwidth: by round, bytes per second that a loop in C read from memory.
        token_bytes: of weights, keys and values that a token reads; None: not counted.
    """

    model: str
    who: str
    format: str
    group: str = ""
    size: int = 0
    load: list[float] = field(default_factory=list)
    load_gguf: list[float] = field(default_factory=list)
    peak: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    read: list[float] = field(default_factory=list)
    quantize: list[float] = field(default_factory=list)
    reload: list[float] = field(default_factory=list)
    reload_peak: dict[str, int] = field(default_factory=dict)
    identical: bool | None = None
    error: float | None = None
    prefill: dict[str, list[float]] = field(default_factory=dict)
    decode: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    token_bytes: int | None = None

    @property
    def name(self) -> str:
        """Model and format, for targets."""
        return f"{self.model} {self.format}"

    def prefill_rate(self, prompt: int) -> float | None:
        """Tokens per second, the median."""
        times = self.prefill.get(str(prompt))
        return prompt / statistics.median(times) if times else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second, the median."""
        return 1 / statistics.median(self.decode) if self.decode else None

    @property
    def alone(self) -> bool:
        """Whether other programs left the machine to it in most rounds."""
        return not self.others or statistics.median(self.others) <= OTHERS

    @property
    def bandwidth_share(self) -> float | None:
        """Of the time of a token, what reading its weights, keys and values takes at the speed of the same run."""
        rate = self.decode_rate
        if rate is None or self.token_bytes is None or not self.bandwidth:
            return None
        return self.token_bytes * rate / statistics.median(self.bandwidth)

    def load_ratio(self) -> float | None:
        """Loading over the longer of its two parts, the best of each."""
        if not (self.load and self.read and self.quantize):
            return None
        return min(self.load) / max(min(self.read), min(self.quantize))


@dataclass
class ModelResults:
    """All runs, the overhead of a layer by format in microseconds, what could not be measured and why, and facts."""

    runs: list[Run] = field(default_factory=list)
    overhead: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # what -> why
    facts: dict[str, Any] = field(default_factory=dict)

    def beside(self, run: Run, who: str, fmt: str | None = None) -> Run | None:
        """What took turns with a run: of that library, in the same format or another."""
        for other in self.runs:
            if (other.model, other.group, other.who, other.format) == (run.model, run.group, who, fmt or run.format):
                return other
        return None

    def ours(self) -> list[Run]:
        return [run for run in self.runs if run.who == ISQTORCH]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelResults:
        return cls([Run(**run) for run in data["runs"]], data["overhead"], data["skipped"], data["facts"])
