"""The measurements of one report on a GPU.

Every product of a shape and a number of rows runs for all contenders one after the other. Copies of the weight rotate, so that
none of it is in the second-level cache when its turn comes again, as in a model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import get_format
from isqtorch.quantizers import has_rule

from .clock import Clock
from .contenders import Contender, Ours, OursRounded, Product, Unavailable

OURS, ROUNDED = Ours.name, OursRounded.name
Shape = tuple[int, int]


def _check(product: Product, weight: Tensor, x: Tensor) -> None:
    """AssertionError if it multiplies with another weight. Even two bits are less than 0.6 off, another weight more than 1."""
    y = product.calls[0]()
    if isinstance(y, Tensor):
        exact = x.float() @ weight[:128].float().t()
        error = float((y[..., :128].float() - exact).norm() / exact.norm())
        if not error < 0.6:
            raise AssertionError(f"its product is off by {error:.2g}")


def in_a_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:240]


@dataclass(frozen=True)
class Case:
    """One measured product (or quantization: m is 0)."""

    who: str
    format: str
    n: int
    k: int
    m: int
    seconds: float
    nbytes: int  # of the packed weight

    @property
    def rate(self) -> float:
        """Packed bytes per second."""
        return self.nbytes / self.seconds

    @property
    def tflops(self) -> float:
        return 2 * self.m * self.n * self.k / self.seconds / 1e12


@dataclass
class Results:
    """What came out, and what did not.

    Attributes:
        facts: about the machine and the run.
        cases: what was measured.
        skipped: what was not, and why: no time, a library that refuses.
        faults: what of ours went wrong; the rest of the report counts none the less.
    """

    facts: dict[str, Any]
    cases: list[Case]
    skipped: list[str]
    faults: list[str] = field(default_factory=list)

    def find(self, who: str, format: str, shape: Shape, m: int) -> Case | None:
        for case in self.cases:
            if (case.who, case.format, case.n, case.k, case.m) == (who, format, *shape, m):
                return case
        return None

    def to_json(self) -> dict[str, Any]:
        cases = [asdict(case) for case in self.cases]
        return {"facts": self.facts, "faults": self.faults, "skipped": self.skipped, "cases": cases}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        return cls(data["facts"], [Case(**case) for case in data["cases"]], data["skipped"], data.get("faults", []))


class Session:
    """Measures and collects.

    Args:
        device: with the weights.
        clock: for what a CUDA graph can have.
        wall: for the rest.
        cache: bytes of the device's largest cache.
        deadline: `time.monotonic()` after which nothing new is begun; what is left out is reported.
    """

    def __init__(self, device: str, clock: Clock, wall: Clock, *, cache: int, deadline: float) -> None:
        self.device, self.clock, self.wall, self.cache, self.deadline = device, clock, wall, cache, deadline
        self.results = Results({}, [], [])

    def copies(self, nbytes: int) -> int:
        """As many as exceed the cache four times, but two at least."""
        return max(2, 4 * self.cache // nbytes + 1) if self.cache else 2

    def products(self, contenders: Sequence[Contender], shape: Shape, rows: Sequence[int]) -> None:
        """All formats of all contenders for all numbers of rows."""
        weight = self._weight(shape)
        xs = {m: self._activations(m, shape[1]) for m in rows}
        for contender in contenders:
            for format in contender.formats:
                for m in rows:
                    if self._late(f"{contender.name} {format} {shape[0]}x{shape[1]} M={m}"):
                        continue
                    try:
                        product = contender.product(format, weight, xs[m], self.copies)
                        _check(product, weight, xs[m])
                        seconds = self._seconds(product)
                    except (Unavailable, RuntimeError, TypeError, AttributeError, AssertionError) as error:
                        is_fault = contender.name in (OURS, ROUNDED) and not isinstance(error, Unavailable)
                        kept = self.results.faults if is_fault else self.results.skipped
                        kept.append(f"{contender.name} {format} {shape[0]}x{shape[1]} M={m}: {in_a_line(error)}")
                        continue
                    self._add(contender.name, format, shape, m, seconds, product.nbytes)

    def quantize(self, formats: Sequence[str], shape: Shape) -> None:
        """Quantizing a matrix of bf16, by default and, as "afq4+search", with a search for scales where there is one."""
        weight = self._weight(shape)
        for format in formats:
            for rule in (None, "search"):
                name = f"{format}+{rule}" if rule else format
                if not has_rule(get_format(format), rule) or self._late(f"quantize {name}"):
                    continue
                call = partial(ops.quantize, weight, format, None, rule)
                try:
                    packed = call()
                    want = ops.reference.dequantize(packed[:4], format, torch.float32)
                    assert torch.equal(ops.dequantize(packed[:4], format, torch.float32), want), (
                        "decoded weights differ"
                    )
                    seconds = self.wall.seconds([call])
                except (RuntimeError, AssertionError) as error:
                    self.results.faults.append(f"quantize {name}: {in_a_line(error)}")
                    continue
                self._add(OURS, name, shape, 0, seconds, weight.nbytes + packed.nbytes)

    def bandwidth(self, nbytes: int = 1 << 30) -> None:
        """What the device reads, and copies, per second: the roof of all products with few rows."""
        source = torch.ones(nbytes // 8, dtype=torch.int64, device=self.device)
        target = torch.empty_like(source)
        facts = self.results.facts
        facts["read"] = nbytes / self.clock.seconds([source.sum])
        facts["copy"] = 2 * nbytes / self.clock.seconds([lambda: target.copy_(source)])

    def _seconds(self, product: Product) -> float:
        clock = self.clock if product.captured else self.wall
        return clock.seconds(product.calls) / product.at_once

    def _add(self, who: str, format: str, shape: Shape, m: int, seconds: float, nbytes: int) -> None:
        self.results.cases.append(Case(who, format, *shape, m, seconds, nbytes))

    def _late(self, what: str) -> bool:
        if time.monotonic() < self.deadline:
            return False
        self.results.skipped.append(f"{what}: no time left")
        return True

    def _weight(self, shape: Shape) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(shape[0] * shape[1])
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16) * 0.02

    def _activations(self, m: int, k: int) -> Tensor:
        return torch.randn(m, k, generator=torch.Generator(self.device).manual_seed(m), device=self.device).bfloat16()
