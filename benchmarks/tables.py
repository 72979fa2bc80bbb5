"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from isqtorch.text import markdown_table

from .output import MARK
from .results import BF16, GGML, MEMORY, OURS, Case, Results
from .targets import Target


def misses(targets: Sequence[Target]) -> str:
    """For every target that is not met, the formats that miss it."""
    lines = []
    for target in targets:
        missed = [name for name in target.ratios if not target.meets(name)]
        below = [f"{name} {target.show(target.ratios[name])}{target.of_limit(name)}" for name in missed]
        if below:
            lines.append(f"- {target.what}, against {target.against}: {', '.join(below)}")
    return "\n".join(lines) or "None."


def few_table(results: Results) -> str:
    """One and eight rows of x."""
    headers = ["format", "MB", "read GB/s", "DRAM GB/s", "% of read", "ggml DRAM", "hot ms", "hot GB/s", "ggml ms"]
    headers += ["ggml path", "ggml / ours", "M=8 / M=1"]
    rows = []
    for group in results.groups("hot"):
        name = group.split()[1]
        dram = f"dram {name}"
        read, cold, cold_ggml = (results.find(dram, who) for who in (MEMORY, OURS, GGML))
        one, eight = (results.find(group, OURS, format=name, m=m) for m in (1, 8))
        ggml = results.find(group, GGML, m=1)
        assert one and eight and read and cold
        rows.append(
            [name, f"{one.nbytes / 1e6:.1f}", f"{read.gbytes:.1f}", f"{cold.gbytes:.1f}"]
            + [f"{100 * cold.gbytes / read.gbytes:.0f}", _gbytes(cold_ggml), _ms(one), f"{one.gbytes:.1f}"]
            + [_ms(ggml), ggml.path if ggml else "-", _times(one, ggml), f"{eight.median / one.median:.2f}"]
        )
    return markdown_table(headers, rows, right=[i for i in range(1, len(headers)) if headers[i] != "ggml path"])


def many_table(results: Results, kind: str = "many") -> str:
    """128 and 512 rows of x: TFLOPS."""
    headers = ["format", "level"]
    for m in (128, 512):
        headers += [f"M={m}", "bf16", "ggml", "ggml path", "over bf16", "over ggml"]
    rows = []
    for group in results.groups(kind):
        ours = results.find(group, OURS)
        assert ours
        row = [ours.format, ours.path]
        for m in (128, 512):
            mine, bf16, ggml = (results.find(group, who, m=m) for who in (OURS, BF16, GGML))
            row += [_tflops(mine), _tflops(bf16), _tflops(ggml), ggml.path if ggml else "-"]
            row += [_times(mine, bf16), _times(mine, ggml)]
        rows.append(row)
    return markdown_table(headers, rows, right=[i for i in range(2, len(headers)) if headers[i] != "ggml path"])


def quantize_table(results: Results) -> str:
    """Millions of weights per second on one thread."""
    headers = ["format"]
    for variant in ("plain", "importance"):
        headers += [variant, "ggml", "over ggml", "same bytes"]
    rows = []
    for group in results.groups("quantize"):
        row = [group.split()[1]]
        for variant in ("plain", "importance"):
            ours, ggml = (results.find(group, who, path=variant) for who in (OURS, GGML))
            same = results.identical.get(f"{group} {variant}")
            row += [_rate(ours), _rate(ggml), _times(ours, ggml), MARK[same]]
        rows.append(row)
    return markdown_table(headers, rows, right=[i for i in range(1, len(headers)) if headers[i] != "same bytes"])


def threads_table(results: Results) -> str:
    rows = []
    for group in results.groups("threads"):
        one, two = (results.find(group, OURS, threads=n) for n in (1, 2))
        loops = [results.find(group, MEMORY, threads=n) for n in (2, 1)]
        assert one and two
        rows.append([group.partition(" ")[2], _ms(one), _ms(two), _times(two, one), f"{one.best / two.best:.2f}"])
        rows[-1].append(_times(*loops))
    headers = ["what", "1 thread, ms", "2 threads, ms", "ratio", "of the best rounds", "of an ideal loop"]
    return markdown_table(headers, rows, right=range(1, 6))


def peers_table(results: Results) -> str:
    """Milliseconds of other libraries' layers, beside our format of that size and bf16."""
    headers = ["peer", "format", "M", "path", "ms", "ours", "ms", "bf16 ms", "over peer"]
    rows = []
    for group in results.groups("peer"):
        _, name, fmt = group.split()
        for m in (1, 8, 128, 512):
            peer, ours, bf16 = (results.find(group, who, m=m) for who in (name, OURS, BF16))
            if peer and ours:
                rows.append([name, fmt, str(m), peer.path, _ms(peer), ours.format, _ms(ours), _ms(bf16)])
                rows[-1].append(_times(ours, peer))
    return markdown_table(headers, rows, right=[2, 4, 6, 7, 8]) if rows else "No other library was installed."


def roofline(results: Results) -> list[str]:
    """Lines about what the machine can do."""
    lines = []
    for group in ("read from memory", "read hot, as much as a q4_0 matrix"):
        rates = [results.find(group, MEMORY, threads=n) for n in (1, 2)]
        text = ", ".join(f"{_gbytes(case)} GB/s with {n} thread{'s' * (n > 1)}" for n, case in enumerate(rates, 1))
        lines.append(f"{group}: {text}{f'; {rates[0].path}' if rates[0] else ''}")
    for threads in (1, 2):
        peak = max((case for case in results.cases if case.group == "peak" and case.threads == threads), key=_speed)
        lines.append(
            f"bf16 F.linear at its best, {threads} thread{'s' * (threads > 1)}: {_tflops(peak)} TFLOPS, M={peak.m}"
        )
    return lines


def _speed(case: Case) -> float:
    return case.tflops


def _ms(case: Case | None) -> str:
    return f"{1e3 * case.median:.3g}" if case else "-"


def _gbytes(case: Case | None) -> str:
    return f"{case.gbytes:.1f}" if case else "-"


def _tflops(case: Case | None) -> str:
    return f"{case.tflops:.3f}" if case else "-"


def _rate(case: Case | None) -> str:
    return f"{case.mweights:.1f}" if case else "-"


def _times(ours: Case | None, other: Case | None) -> str:
    return f"{other.median / ours.median:.2f}" if ours and other else "-"
