"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from isqtorch.text import markdown_table

from .judges import Score
from .measure import KL, Quality, Results

_TEXT_COLUMNS = 2


def quality_table(results: Results, text: int = 0) -> str:
    """All rows on one text; "change" is that of the mean distance against the same spec plain."""
    plain = {row.spec: row for row in results.rows if not row.how}
    measure = results.facts["measure"]
    headers = ["format", "how", "size MB", "bits/weight", f"mean {measure}", "change", f"99 % {measure}", "top-1 %"]
    if measure == KL:
        headers.insert(4, "perplexity")
    rows = [_cells(row, plain.get(row.spec), text) for row in results.rows]
    return markdown_table(headers, rows, right=range(_TEXT_COLUMNS, len(headers)))


def _cells(row: Quality, plain: Quality | None, text: int) -> list[str]:
    score = row.scores[text]
    before = plain.scores[text].distance if plain and row.how else 0.0
    cells = [
        row.spec,
        row.how.replace("+", ", "),
        f"{row.size / 1e6:.2f}",
        f"{row.bits_per_weight:.2f}",
        with_error(score),
        f"{100 * (score.distance / before - 1):+.0f} %" if before else "",
        f"{score.p99:#.3g}" if score.p99 else "0",
        f"{score.top1:.2f}",
    ]
    if score.perplexity is not None:
        cells.insert(4, f"{score.perplexity:.3f}")
    return cells


def with_error(score: Score) -> str:
    """A mean with three digits and its standard error with as many decimals: "0.0123 ± 0.0004"; "0" for the original."""
    if not score.distance:
        return "0"
    mean = f"{score.distance:#.3g}"
    if "e" in mean:
        return f"{mean} ± {score.stderr:.1e}"
    return f"{mean} ± {score.stderr:.{len(mean.partition('.')[2])}f}"


def conditions(results: Results) -> str:
    """What was run on what."""
    facts, base = results.facts, results.rows[0]
    lines = [f"model {facts['title']}, computing in {base.spec}" + (f"; {facts['note']}" if facts["note"] else "")]
    for score in base.scores:
        unit = "sentences" if score.perplexity is None else f"scored tokens in windows of {facts['context']}"
        lines.append(f"{score.text} (SHA-256 {facts['texts'][score.text]}): {score.count} {unit}")
        if score.perplexity is not None:
            lines[-1] += f", perplexity of the original {score.perplexity:.3f} ± {score.perplexity_stderr:.3f}"
    lines += [
        f"importance from {facts['calibrated']}",
        f"isqtorch {', '.join(commits(results))}, torch {facts['torch']}, kernels {facts['kernels']}, {facts['date']}",
    ]
    skipped = [f"not measured: {name}: {why}" for name, why in results.skipped.items()]
    return bullets([*lines, *skipped])


def commits(results: Results) -> list[str]:
    """The versions of isqtorch that measured the rows, in their order."""
    found = [row.commit for row in results.rows[1:] if row.commit]
    return list(dict.fromkeys(found)) or [results.facts["commit"]]


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def markdown(results: Results, picture: str) -> str:
    """A table for each text, picture and conditions, without a headline."""
    measure = results.facts["measure"]
    tables = []
    for i, score in enumerate(results.rows[0].scores):
        tables += [f"On {score.text}:"] * (len(results.rows[0].scores) > 1) + [quality_table(results, i)]
    parts = [
        f"    {results.facts['command']}",
        *tables,
        f"![mean {measure} against bits per weight]({picture})",
        conditions(results),
    ]
    return "\n\n".join(parts)
