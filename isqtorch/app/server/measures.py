"""What the server has done so far, in numbers: for /metrics, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds: the upper ends of the histogram

_HELP = {
    "requests_total": ("counter", "replies that have ended"),
    "failed_total": ("counter", "replies that ended with an error"),
    "prompt_tokens_total": ("counter", "tokens of prompts"),
    "reused_tokens_total": ("counter", "tokens of prompts whose keys and values were kept from earlier prompts"),
    "generated_tokens_total": ("counter", "tokens of replies"),
    "steps_total": ("counter", "steps of a batch"),
    "step_rows_total": ("counter", "replies in these steps; divided by the steps it is the mean size of a batch"),
    "running": ("gauge", "replies under way in batches"),
    "waiting": ("gauge", "requests whose turn has not come"),
}


class Measures:
    """Counters. One thread counts; others may read at any time."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys((name for name, (kind, _) in _HELP.items() if kind == "counter"), 0)
        self._first = [0] * (len(_FIRST_TOKEN) + 1)
        self._seconds = 0.0

    def began(self, prompt: int, seconds: float) -> None:
        """A prompt was read, and the first token came that many seconds after the request."""
        self.counts["prompt_tokens_total"] += prompt
        self._seconds += seconds
        self._first[sum(seconds > end for end in _FIRST_TOKEN)] += 1

    def reused(self, tokens: int) -> None:
        """The beginning of a prompt was known."""
        self.counts["reused_tokens_total"] += tokens

    def stepped(self, rows: int) -> None:
        """A step gave a token to each row."""
        self.counts["steps_total"] += 1
        self.counts["step_rows_total"] += rows

    def ended(self, tokens: int, failed: bool) -> None:
        """A reply has ended."""
        self.counts["requests_total"] += 1
        self.counts["failed_total"] += failed
        self.counts["generated_tokens_total"] += tokens

    def text(self, gauges: Mapping[str, int]) -> str:
        """All numbers, for Prometheus."""
        lines = []
        for name, value in {**self.counts, **gauges}.items():
            kind, meaning = _HELP[name]
            lines += [f"# HELP isqtorch_{name} {meaning}", f"# TYPE isqtorch_{name} {kind}", f"isqtorch_{name} {value}"]
        name = "isqtorch_first_token_seconds"
        lines += [f"# HELP {name} from the request to its first token", f"# TYPE {name} histogram"]
        below = 0
        for end, count in zip((*map(str, _FIRST_TOKEN), "+Inf"), self._first, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{end}"}} {below}')
        lines += [f"{name}_sum {self._seconds:.6f}", f"{name}_count {below}"]
        return "\n".join(lines) + "\n"
