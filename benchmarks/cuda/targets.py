"""What the kernels should reach on an H100, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from isqtorch import formats, get_format

from .session import OURS, ROUNDED, Case, Results, Shape

DECODE_SHAPES: list[Shape] = [(8192, 8192), (16384, 16384)]
QUANTIZE_SHAPE: Shape = (4096, 14336)
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048]
BANDWIDTH = 3.0e12  # bytes per second that an H100 gives to such kernels


@dataclass
class Target:
    """A row of the table.

    Attributes:
        unit: "%", "x", "ms"; values are in it.
        least: the bound; `most` instead where less is better.
        values: by case, as "q4k 8192x8192 M=1".
    """

    what: str
    against: str
    unit: str
    least: float | None = None
    most: float | None = None
    values: dict[str, float] = field(default_factory=dict)

    def good(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)

    @property
    def met(self) -> bool | None:
        """None if nothing was measured."""
        return all(map(self.good, self.values.values())) if self.values else None

    @property
    def target(self) -> str:
        return f">= {self.show(self.least)}" if self.least is not None else f"<= {self.show(self.most or 0.0)}"

    def show(self, value: float) -> str:
        return (
            f"{value:.0f} %"
            if self.unit == "%"
            else f"{value:.2f} {self.unit}"
            if self.unit == "ms"
            else f"{value:.2f}x"
        )

    @property
    def measured(self) -> str:
        if not self.values:
            return "not measured"
        pick = min if self.least is not None else max
        worst = pick(self.values, key=lambda name: self.values[name])
        good = sum(map(self.good, self.values.values()))
        return f"{good} of {len(self.values)}; worst {worst}: {self.show(self.values[worst])}"


def _bits(format: str) -> float:
    return get_format(format).bits


def judge(results: Results) -> list[Target]:
    """All targets, from the cases of one run."""
    names = formats()
    wide, narrow = [n for n in names if 4 <= _bits(n) <= 8], [n for n in names if _bits(n) < 4]
    roof = results.facts.get("roof", BANDWIDTH)
    label = f"{roof / 1e12:.2g} TB/s"

    few = Target("M = 1 to 8, 4 to 8 bits: packed bytes", label, "%", least=80)
    few_peer = Target("M = 1 to 8, 4 to 8 bits", "best other library", "x", least=1.5)
    flat = Target("M = 8, 4 to 8 bits: time", "M = 1", "x", most=1.1)
    low = Target("M = 1, 2 and 3 bits", "bf16 cuBLAS", "x", least=3.5)
    batch = Target("M = 16 to 64", "bf16 cuBLAS", "x", least=2.5)
    batch_peer = Target("M = 16 to 64", "best other library", "x", least=1.0)
    prompt = Target("M = 512", "bf16 cuBLAS", "x", least=1.0)
    long = Target("M = 2048", "bf16 cuBLAS", "x", least=0.9)

    rounded = Target("fp8 with activations in FP8, M = 512 and 2048", "isqtorch fp8 without", "x", least=1.0)
    rounded_long = Target("fp8 with activations in FP8, M = 2048", "bf16 cuBLAS", "x", least=1.0)

    def note(target: Target, ours: Case, value: Callable[[Case], float | None]) -> None:
        got = value(ours)
        if got is not None:
            target.values[f"{ours.format} {ours.n}x{ours.k} M={ours.m}"] = got

    def over(other: Case | None) -> Callable[[Case], float | None]:
        return lambda ours: other.seconds / ours.seconds if other else None

    for ours in results.cases:
        if ours.who == ROUNDED:
            shape = (ours.n, ours.k)
            note(rounded, ours, over(results.find(OURS, "fp8", shape, ours.m)))
            if ours.m == 2048:
                note(rounded_long, ours, over(results.find("bf16", "bf16", shape, ours.m)))
        if ours.who != OURS or ours.m == 0:
            continue
        shape = (ours.n, ours.k)
        bf16, peer = results.find("bf16", "bf16", shape, ours.m), _best_peer(results, ours)
        if ours.m <= 8 and ours.format in wide:
            note(few, ours, lambda c: 100 * c.rate / roof)
            note(few_peer, ours, over(peer))
        if ours.m == 8 and ours.format in wide:
            one = results.find(OURS, ours.format, shape, 1)
            note(flat, ours, lambda c, one=one: c.seconds / one.seconds if one else None)  # type: ignore[misc]
        if ours.m == 1 and ours.format in narrow:
            note(low, ours, over(bf16))
        if 16 <= ours.m <= 64:
            note(batch, ours, over(bf16))
            note(batch_peer, ours, over(peer))
        if ours.m == 512:
            note(prompt, ours, over(bf16))
        if ours.m == 2048:
            note(long, ours, over(bf16))
    products = [few, few_peer, flat, low, batch, batch_peer, prompt, long, rounded, rounded_long]
    return [*products, *_quantize(results, roof), _generate(results)]


def _best_peer(results: Results, ours: Case) -> Case | None:
    """The fastest other library with weights of about as many bits (and no more than ours), but for bf16."""
    cases: Iterable[Case] = (
        case
        for case in results.cases
        if (case.n, case.k, case.m) == (ours.n, ours.k, ours.m)
        and case.who not in (OURS, ROUNDED, "bf16")
        and abs(case.nbytes - ours.nbytes) < 0.15 * ours.nbytes
    )
    return min(cases, key=lambda case: case.seconds, default=None)


def _quantize(results: Results, roof: float) -> list[Target]:
    search = Target("quantize 4096 x 14336 to q4k", "-", "ms", most=10)
    plain = Target(
        "quantize 4096 x 14336 to q8_0 and afq4: bytes read and written", f"{roof / 1e12:.2g} TB/s", "%", least=50
    )
    for case in results.cases:
        if case.who == OURS and case.m == 0:
            if case.format == "q4k":
                search.values[case.format] = 1e3 * case.seconds
            elif case.format in ("q8_0", "afq4"):
                plain.values[case.format] = 100 * case.rate / roof
    return [search, plain]


def _generate(results: Results) -> Target:
    target = Target("8B-shaped model, generate with optimize_, one sequence", "the same in bf16", "x", least=2.0)
    speeds: dict[str, float] = results.facts.get("generate", {})
    if "bf16" in speeds:
        target.values = {name: speed / speeds["bf16"] for name, speed in speeds.items() if name != "bf16"}
    return target
