"""The targets, and whether the measurements meet them.

Every target compares two cases of one group, which ran in turns: a ratio that should be at least, in one row at most, some number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .results import BF16, GGML, MEMORY, OURS, Case, Results

SLOW_IN_GGML = ("q2k", "q3k", "q5_0", "q5_1")
"""Formats for which ggml has no fast path at one row, so that more is asked of us."""

TIERS = {"amx": 3.0, "avx512": 1.5, "avx2": 1.2}
"""Speed over ggml at many rows that is asked for, by what both sides may use."""

FREE = (1.7, 2.1)
"""What two threads of a loop without shared work reach over one on a quiet machine; outside of it the pair beside it says nothing."""

READ_HOT = "read hot, as much as a q4_0 matrix"
"""The group of the bandwidth that bounds one hot matrix."""

QUANTIZE = {"plain": 8.0, "importance": 6.0}


@dataclass
class Target:
    """A row of the table.

    Attributes:
        ratios: by format, and where several M count by "format M=..".
        needs: the bound where it is not `need`.
        limits: what reading the weights at the bandwidth measured in this run would reach: no kernel can be above it.
    """

    what: str
    against: str
    need: float
    at_most: bool = False
    percent: bool = False
    unit: str = "x"
    ratios: dict[str, float] = field(default_factory=dict)
    needs: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # what else is not as it should be
    left_out: list[str] = field(default_factory=list)  # measured, but in circumstances that make it worthless
    missing: list[str] = field(default_factory=list)  # why something was not measured

    def meets(self, name: str) -> bool:
        need, ratio = self.needs.get(name, self.need), self.ratios[name]
        return ratio <= need if self.at_most else ratio >= need

    @property
    def met(self) -> bool | None:
        """None if nothing was measured."""
        if not self.ratios:
            return None
        return not self.failed and all(map(self.meets, self.ratios))

    @property
    def worst(self) -> str:
        """The name that is furthest from its bound."""

        def margin(name: str) -> float:
            quotient = self.ratios[name] / self.needs.get(name, self.need)
            return -quotient if self.at_most else quotient

        return min(self.ratios, key=margin)

    def of_limit(self, name: str) -> str:
        """How near a ratio is to its limit, in words; empty where there is none."""
        if name not in self.limits:
            return ""
        return f" ({100 * self.ratios[name] / self.limits[name]:.0f} % of what the bandwidth allows, {self.limits[name]:.2f}x)"

    def show(self, ratio: float) -> str:
        return f"{100 * ratio:.0f} %" if self.percent else f"{ratio:.2f}{self.unit}"

    @property
    def target(self) -> str:
        others: dict[float, list[str]] = {}
        for name, need in self.needs.items():
            others.setdefault(need, []).append(name)
        sign = "<=" if self.at_most else ">="
        extra = [f"; {sign} {self.show(need)} for {', '.join(names)}" for need, names in others.items()]
        return f"{sign} {self.show(self.need)}{''.join(extra)}"

    @property
    def measured(self) -> str:
        text = "not measured"
        if self.ratios:
            good = sum(map(self.meets, self.ratios))
            text = f"{good} of {len(self.ratios)}; worst {self.worst}: {self.show(self.ratios[self.worst])}"
        left_out = [f"{len(self.left_out)} left out: other work took a core"] if self.left_out else []
        return "; ".join([text, *self.failed, *left_out, *self.missing])


def judge(results: Results, pace: dict[str, str]) -> list[Target]:
    """All targets.

    Args:
        results: of one run.
        pace: for each format that ggml does not have, the one whose packed GB/s is its measure.
    """
    memory = Target("M=1, weights from memory", "read bandwidth, same run", 0.9, percent=True)
    memory_ggml = Target("M=1, weights from memory", "ggml, best path", 1.0)
    hot = Target("M=1, one matrix hot", "ggml, best path", 1.3)
    family = Target("M=1, hot: AFQ, HQQ, FP8", "packed GB/s of our q4_0 (8 bits: q8_0)", 0.9)
    eight = Target("M=8, hot", "our time at M=1", 2.0, at_most=True)
    bf16 = Target("M=512", "bf16 F.linear", 0.9)

    for group in results.groups("dram"):
        ours = results.find(group, OURS)
        _compare(memory, ours, results.find(group, MEMORY), lambda a, b: a.gbytes / b.gbytes)
        _compare(memory_ggml, ours, results.find(group, GGML), _faster)
    cache = results.find(READ_HOT, MEMORY, threads=1)
    for group in results.groups("hot"):
        name = group.split()[1]
        one = results.find(group, OURS, format=name, m=1)
        ggml = results.find(group, GGML, m=1)
        _compare(hot, one, ggml, _faster)
        _limit(hot, name, cache, ggml)
        _compare(eight, results.find(group, OURS, format=name, m=8), one, lambda a, b: a.median / b.median)
        if name in pace:
            base = results.find(group, OURS, format=pace[name], m=1)
            _compare(family, one, base, lambda a, b: a.gbytes / b.gbytes)
            _limit(family, name, cache, base)
    hot.needs = {name: 2.0 for name in SLOW_IN_GGML if name in hot.ratios}
    for group in results.groups("many"):
        _compare(bf16, results.find(group, OURS, m=512, threads=1), results.find(group, BF16, m=512), _faster)
    targets = [memory, memory_ggml, hot, family, eight, bf16]
    targets += [_many(results, tier) for tier in TIERS]
    targets += [_quantize(results, variant) for variant in QUANTIZE]
    return [*targets, _threads(results)]


def _faster(ours: Case, other: Case) -> float:
    """How many times as fast we are."""
    return other.median / ours.median


def _limit(target: Target, name: str, read: Case | None, other: Case | None) -> None:
    """Notes how far above `other` reading alone would be: both take the same bytes."""
    if name in target.ratios and read and other:
        target.limits[name] = read.gbytes / other.gbytes


def _compare(
    target: Target, ours: Case | None, other: Case | None, ratio: Callable[[Case, Case], float], label: str = ""
) -> None:
    if ours and other:
        target.ratios[label or ours.format] = ratio(ours, other)


def _many(results: Results, tier: str) -> Target:
    target = Target(f"M=128 and 512, both with {tier}", "ggml, best path", TIERS[tier])
    for group in [*results.groups("many"), *results.groups("tier")]:
        if results.facts.get("tiers", {}).get(group) == tier:
            for m in (128, 512):
                ours = results.find(group, OURS, m=m, threads=1)
                other = results.find(group, GGML, m=m)
                _compare(target, ours, other, _faster, f"{ours.format} M={m}" if ours else "")
    return target


def _quantize(results: Results, variant: str) -> Target:
    target = Target(f"quantize K-quants, one core, {variant}", "ggml", QUANTIZE[variant])
    for group in results.groups("quantize"):
        ours = results.find(group, OURS, path=variant, threads=1)
        other = results.find(group, GGML, path=variant)
        if ours and other and ours.format.endswith("k"):
            _compare(target, ours, other, _faster)
            if not results.identical[f"{group} {variant}"]:
                target.failed.append(f"{ours.format}: other bytes than ggml's")
    return target


def _threads(results: Results) -> Target:
    target = Target("2 threads", "1 thread, wall time", 1.85)
    for group in results.groups("threads"):
        label = group.partition(" ")[2]
        one, two = (results.find(group, OURS, threads=n) for n in (1, 2))
        loop, loop_of_two = (results.find(group, MEMORY, threads=n) for n in (1, 2))
        if loop and loop_of_two and not FREE[0] <= _faster(loop_of_two, loop) <= FREE[1]:
            target.left_out.append(label)
        else:
            _compare(target, two, one, _faster, label)
    return target
