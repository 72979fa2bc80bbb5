"""The text of a reply while its tokens are generated: decoding, stop strings, and the parts of a chat message.

transformers can stop at strings too. It prepares a table of the vocabulary for that, which takes hundreds of megabytes
for a long string, and leaves the string in the text. Searching the text needs no table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cli.serving.utils import response_events_to_chunks

_HALF = "\ufffd"  # what a tokenizer returns for a character whose last bytes are not there yet
_PATIENCE = 8  # tokens to wait for these bytes; a character has at most four


@dataclass
class Chances:
    """The log probabilities at one place of a reply: of the token there, and of the likeliest ones."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]
    start: int = 0  # characters of the reply before the token


class Decoder:
    """Tokens to text, one at a time. A token can be a part of a character, and its text can depend on the one before."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._before: list[int] = []  # tokens whose text is out, as far as it matters for the next
        self._pending: list[int] = []

    def step(self, token: int) -> str:
        """The text that this token completes."""
        self._pending.append(token)
        return self._release(final=len(self._pending) > _PATIENCE)

    def rest(self) -> str:
        """The text of the tokens that are still incomplete."""
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        if not self._pending:
            return ""
        known = self._decode(self._before)
        text = self._decode([*self._before, *self._pending])
        if not final and (text.endswith(_HALF) or len(text) <= len(known)):
            return ""
        self._before, self._pending = self._pending, []
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
        return text


class StopText:
    """Passes text on up to the first stop string. Text that may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that can be passed on."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """The text held back; at the end of a reply it is not a stop string."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


class Streamer:
    """Turns tokens into parts of a reply; also a streamer for `generate`.

    Args:
        tokenizer: the tokenizer.
        stops: the stop strings.
        parser: transformers' parser of the model's way to write tool calls and thoughts, or None.
        emit: called with each part: `str`, `ReasoningText` or `ToolCall`.
        cancel: called by transformers when a stream is closed.

    Attributes:
        tokens: so far.
        said: log probabilities of the text that was emitted, if they are wanted; the reader takes them out.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        parser: Any,
        emit: Callable[[Any], None],
        cancel: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder = Decoder(tokenizer, skip_special_tokens=parser is None)  # the parser looks for these tokens
        self._stop, self._parser, self._emit, self.cancel = StopText(stops), parser, emit, cancel
        self._prompt_is_next = True
        self.tokens: list[int] = []
        self.said: deque[Chances] = deque()
        self._unsaid: list[Chances] = []  # of text that may still become a stop string, or half of a character
        self._decoded = self._passed = 0  # characters
        self._chances: Callable[[int], Chances] | None = None
        if parser is not None:
            self._emit_events(parser.initial_events)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found

    @property
    def total_tokens(self) -> int:
        """The number of tokens, by the name that transformers uses."""
        return len(self.tokens)

    def watch(self, chances: Callable[[int], Chances]) -> None:
        """Ask for the log probabilities of each token that `generate` puts."""
        self._chances = chances

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            self.token(token, None if self._chances is None else self._chances(token))

    def token(self, token: int, chances: Chances | None = None) -> None:
        """The next token of the reply."""
        self.tokens.append(token)
        if chances is not None:
            chances.start = self._decoded
            self._unsaid.append(chances)
        text = self._decoder.step(token)
        self._decoded += len(text)
        self._pass_on(self._stop.feed(text))

    def end(self) -> None:
        """Called after the last token."""
        self._pass_on(self._stop.feed(self._decoder.rest()) + self._stop.rest())
        if not self.stopped:
            self._said(float("inf"))
        if self._parser is not None:
            try:
                self._emit_events(self._parser.finalize()[1])
            except (ValueError, RuntimeError):
                pass  # the reply ended inside a tool call, which is left out, as transformers does

    def _pass_on(self, text: str) -> None:
        if not text:
            return
        self._passed += len(text)
        self._said(self._passed)
        if self._parser is None:
            self._emit(text)
        else:
            self._emit_events(self._parser.feed(text))

    def _said(self, end: float) -> None:
        """Release the log probabilities of the tokens that begin before a place in the text."""
        while self._unsaid and self._unsaid[0].start < end:
            self.said.append(self._unsaid.pop(0))

    def _emit_events(self, events: Any) -> None:
        for part in response_events_to_chunks(events):
            self._emit(part)
