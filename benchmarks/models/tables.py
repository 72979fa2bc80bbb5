"""Measurements of whole models as Markdown."""

from __future__ import annotations

import statistics

from isqtorch.text import markdown_table

from .engines import BF16, TRANSFORMERS
from .results import ModelResults, Run
from .targets import PROMPTS


def loading_table(results: ModelResults) -> str:
    """What loading takes."""
    headers = ["model", "library", "format", "MB", "load s", "from GGUF", "read s", "quantize s", "over the longer"]
    headers += ["peak MB", "anonymous", "peak / size", "kept MB"]
    rows = []
    for run in results.runs:
        row = [run.model, run.who, run.format, _mb(run.size or None), _seconds(run.load), _seconds(run.load_gguf)]
        row.append(_seconds(run.read))
        row += [_seconds(run.quantize), _ratio(run.load_ratio())]
        row += [_mb(run.peak.get("total")), _mb(run.peak.get("anonymous"))]
        row += [_ratio(run.peak["total"] / run.size if run.peak and run.size else None), _mb(run.kept.get("total"))]
        rows.append(row)
    return markdown_table(headers, rows, right=range(3, len(headers)))


def reload_table(results: ModelResults) -> str:
    """Loading what was saved."""
    headers = ["model", "format", "MB", "load s", "anonymous MB", "% of size", "same bits"]
    rows = []
    for run in results.ours():
        if run.reload:
            anonymous = run.reload_peak.get("anonymous")
            share = f"{100 * anonymous / run.size:.1f}" if anonymous is not None else "-"
            same = {True: "yes", False: "**no**", None: "-"}[run.identical]
            rows.append([run.model, run.format, _mb(run.size), _seconds(run.reload), _mb(anonymous), share, same])
    return markdown_table(headers, rows, right=range(2, 6))


def speed_table(results: ModelResults) -> str:
    """Tokens per second of `generate`."""
    headers = ["model", "library", "format"]
    headers += [f"prefill {prompt}" for prompt in PROMPTS]
    headers += [f"decode after {PROMPTS[0]}", "over bf16", "of bandwidth", "rounds", "others took", "logits off by"]
    rows = []
    for run in results.runs:
        row = [run.model, run.who, run.format, *(_rate(run.prefill_rate(prompt)) for prompt in PROMPTS)]
        share = run.bandwidth_share
        row += [_rate(run.decode_rate), _ratio(_over_bf16(results, run))]
        row += [f"{100 * share:.0f} %" if share is not None else "-", str(len(run.decode))]
        row.append(f"{100 * statistics.median(run.others):.0f} %" if run.others else "-")
        rows.append([*row, f"{run.error:.3f}" if run.error is not None else "-"])
    return markdown_table(headers, rows, right=range(3, len(headers)))


def overhead_table(results: ModelResults) -> str:
    """Microseconds of one call."""
    rows = [[fmt, f"{us['microseconds']:.2f}", f"{us['nn.Linear']:.2f}"] for fmt, us in results.overhead.items()]
    return markdown_table(["format", "QuantLinear, us", "nn.Linear over F.linear, us"], rows, right=(1, 2))


def _over_bf16(results: ModelResults, run: Run) -> float | None:
    plain, rate = results.beside(run, TRANSFORMERS, BF16), run.decode_rate
    base = plain.decode_rate if plain else None
    return rate / base if rate and base else None


def _mb(count: int | None) -> str:
    return f"{count / 1e6:.0f}" if count is not None else "-"


def _seconds(times: list[float]) -> str:
    return f"{min(times):.2f}" if times else "-"


def _rate(rate: float | None) -> str:
    return f"{rate:.1f}" if rate else "-"


def _ratio(ratio: float | None) -> str:
    return f"{ratio:.2f}" if ratio is not None else "-"


def noise(results: ModelResults) -> str:
    """How quiet the machine was: the slowest round over the fastest."""
    spreads = sorted(max(times) / min(times) for run in results.runs for times in run.prefill.values())
    return f"slowest over fastest round, median of all: {statistics.median(spreads):.2f}" if spreads else "no rounds"


def bandwidth(results: ModelResults) -> str:
    """How fast memory was read between the rounds."""
    rates = [rate for run in results.runs for rate in run.bandwidth]
    if not rates:
        return "memory was not read"
    method = results.facts.get("reader", "a loop")
    median, least, most = (of(rates) / 1e9 for of in (statistics.median, min, max))
    return f"memory, read by all threads ({method}): {median:.1f} GB/s, {least:.1f} to {most:.1f}"
