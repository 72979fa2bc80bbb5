"""Replies of a given form: JSON, JSON of a schema, a regular expression, one of several texts, a grammar.

llguidance says in each step which tokens may come next; the scores of all others become minus infinity.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

MAX_CHARACTERS = 1 << 16  # of a schema, a regular expression or a grammar
MAX_CHOICES = 256  # texts to choose from
_JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # else small models add spaces forever
_MOST_KNOWN = 32
_MISSING = "a reply of a given form needs llguidance on the server: pip install 'isqtorch[serve]'"


@dataclass(frozen=True)
class Form:
    """A form that was asked for.

    Attributes:
        kind: "json" (a schema), "regex", "choice" or "grammar" (of Lark).
        text: the schema as JSON, the expression, the texts as JSON, or the grammar.
    """

    kind: str
    text: str


class Forms:
    """What makes rules of forms, for one tokenizer. The table of its vocabulary is made for the first form."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._table: Any = None
        self._known: dict[Form, Any] = {}  # the latest forms; making one can take a second
        self._lock = threading.Lock()

    def rule(self, form: Form, model: Any, prompt: int) -> LogitsProcessor:
        """A rule for the scores of one reply.

        Args:
            form: the form.
            model: the model, for the size of its vocabulary and its end tokens.
            prompt: tokens of the prompt.

        Raises:
            ValueError: llguidance is missing or does not take the form, or the tokenizer has no table of its tokens.
        """
        with self._lock:
            matcher = self._known.pop(form, None) or self._made(form, model)
            self._known[form] = matcher
            while len(self._known) > _MOST_KNOWN:
                del self._known[next(iter(self._known))]
            return _Rule(matcher.deep_copy(), prompt)

    def _made(self, form: Form, model: Any) -> Any:
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ValueError(_MISSING) from None
        if self._table is None:
            vocabulary = max(model.config.get_text_config().vocab_size, len(self._tokenizer))
            try:
                self._table = from_tokenizer(
                    self._tokenizer, n_vocab=vocabulary, eos_token=model.generation_config.eos_token_id
                )
            except Exception as error:  # it wants a tokenizer of the library "tokenizers"
                raise ValueError(f"replies of a given form do not work with this tokenizer: {error}") from None
        matcher = LLMatcher(self._table, _grammar(LLMatcher, form))
        if matcher.is_error():
            raise ValueError(f"the {form.kind} cannot be used: {' '.join(str(matcher.get_error()).split())[:400]}")
        return matcher


class _Rule(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """The rule for one reply."""

    def __init__(self, matcher: Any, prompt: int) -> None:
        self._matcher, self._seen = matcher, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        from llguidance.torch import fill_next_token_bitmask

        for token in input_ids[0, self._seen :].tolist():
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        self._seen = input_ids.shape[1]
        mask = torch.zeros((1, (scores.shape[-1] + 31) // 32), dtype=torch.int32)
        fill_next_token_bitmask(self._matcher, mask, 0)
        if self._matcher.is_error():
            raise ValueError(f"the form became too complex: {' '.join(str(self._matcher.get_error()).split())[:400]}")
        bits = (mask.unsqueeze(-1) >> torch.arange(32)) & 1
        allowed = bits.flatten(1)[:, : scores.shape[-1]].bool().to(scores.device)
        return scores.masked_fill(~allowed, float("-inf"))


def _grammar(matcher: Any, form: Form) -> str:
    if form.kind == "json":
        return str(matcher.grammar_from_json_schema(form.text, defaults=_JSON))
    if form.kind == "regex":
        return str(matcher.grammar_from_regex(form.text))
    if form.kind == "choice":
        return str(matcher.grammar_from_regex("|".join(_quoted(text) for text in json.loads(form.text))))
    return str(matcher.grammar_from_lark(form.text))


def _quoted(text: str) -> str:
    """A regular expression for a text; only what has a meaning is quoted, because other syntaxes know fewer escapes."""
    return re.sub(r"([\\.^$*+?{}\[\]|()/-])", r"\\\1", text)
