"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from isqtorch.text import markdown_table

from .measure import Quality, Results

HEADERS = ("format", "how", "size MB", "bits/weight", "perplexity", "mean KL", "change", "99 % KL", "top-1 %")
_TEXT_COLUMNS = 2


def quality_table(results: Results) -> str:
    """All rows; "change" is that of the mean KL against the same spec plain."""
    plain = {row.spec: row for row in results.rows if not row.how}
    rows = [_cells(row, plain.get(row.spec)) for row in results.rows]
    return markdown_table(HEADERS, rows, right=range(_TEXT_COLUMNS, len(HEADERS)))


def _cells(row: Quality, plain: Quality | None) -> list[str]:
    change = f"{100 * (row.kl / plain.kl - 1):+.0f} %" if plain and row.how and plain.kl else ""
    return [
        row.spec,
        row.how.replace("+", ", "),
        f"{row.size / 1e6:.2f}",
        f"{row.bits_per_weight:.2f}",
        f"{row.perplexity:.3f}",
        f"{row.kl:#.3g}" if row.kl else "0",
        change,
        f"{row.kl_p99:#.3g}" if row.kl else "0",
        f"{row.top1:.2f}",
    ]


def conditions(results: Results) -> str:
    """What was run on what."""
    facts = results.facts
    lines = [
        f"model {facts['model']}, computing in {results.rows[0].spec}: perplexity {results.rows[0].perplexity:.3f} "
        f"+- {facts['perplexity_stderr']:.3f}",
        f"{facts['scored']} scored tokens of {facts['text']} in windows of {facts['context']}",
        f"importance from {facts['calibrated']}",
        f"isqtorch {facts['commit']}, torch {facts['torch']}, {facts['date']}",
    ]
    skipped = [f"not measured: {name}: {why}" for name, why in results.skipped.items()]
    return bullets([*lines, *skipped])


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def markdown(results: Results, picture: str) -> str:
    """Table, picture and conditions, without a headline."""
    parts = [
        f"    {results.facts['command']}",
        quality_table(results),
        f"![mean KL against bits per weight]({picture})",
        conditions(results),
    ]
    return "\n\n".join(parts)
