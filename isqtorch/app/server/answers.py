"""The bodies of answers: whole ones, and the chunks of a stream.

They are written here and not by transformers' handlers, which know one choice and no log probabilities.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers.cli.serving.utils import ReasoningText, ToolCall

from .replies import Chances

Answer = dict[str, Any]


def sse(data: Any) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def usage(prompt: int, made: int) -> Answer:
    """The numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class Chat:
    """The form of /v1/chat/completions."""

    def __init__(self, request_id: str, model: str, tokenizer: Any) -> None:
        self._base = {"id": request_id, "created": int(time.time()), "model": model}
        self._id, self._texts = request_id, _Texts(tokenizer)

    def whole(self, choices: Sequence[Any], used: Answer) -> Answer:
        """The answer to a request that does not stream."""
        return {**self._base, "object": "chat.completion", "choices": [self._choice(c) for c in choices], "usage": used}

    def first(self, index: int) -> Answer | None:
        """The first chunk of a choice."""
        return self._chunk(index, {"role": "assistant"})

    def part(self, choice: Any, part: Any, said: list[Chances]) -> Answer:
        """A chunk with a part of a choice."""
        delta: Answer
        if isinstance(part, ToolCall):
            delta = {"tool_calls": [{"index": choice.calls, **self._call(choice, part, choice.calls)}]}
        elif isinstance(part, ReasoningText):
            delta = {"reasoning_content": str(part)}
        else:
            delta = {"content": part}
        return self._chunk(choice.index, delta, logprobs=self._logprobs(said) if said else None)

    def last(self, choice: Any, said: list[Chances], used: Answer | None) -> Answer:
        """The chunk that ends a choice."""
        logprobs = self._logprobs(said) if said else None
        return self._chunk(choice.index, {}, choice.finish, logprobs, used)

    def usage(self, used: Answer) -> Answer:
        """The chunk with the numbers of tokens."""
        return {**self._base, "object": "chat.completion.chunk", "choices": [], "usage": used}

    def _chunk(
        self, index: int, delta: Answer, finish: str | None = None, logprobs: Any = None, used: Answer | None = None
    ) -> Answer:
        choice: Answer = {"index": index, "delta": delta, "finish_reason": finish}
        if logprobs is not None:
            choice["logprobs"] = logprobs
        chunk = {**self._base, "object": "chat.completion.chunk", "choices": [choice]}
        return chunk if used is None else {**chunk, "usage": used}

    def _choice(self, choice: Any) -> Answer:
        message: Answer = {"role": "assistant", "content": "".join(p for p in choice.parts if type(p) is str)}
        thoughts = "".join(part for part in choice.parts if isinstance(part, ReasoningText))
        if thoughts:
            message["reasoning_content"] = thoughts
        calls = [part for part in choice.parts if isinstance(part, ToolCall)]
        if calls:
            message["tool_calls"] = [self._call(choice, call, place) for place, call in enumerate(calls)]
        answer = {"index": choice.index, "message": message, "finish_reason": choice.finish}
        if choice.wants_chances:
            answer["logprobs"] = self._logprobs(choice.said())
        return answer

    def _call(self, choice: Any, call: ToolCall, place: int) -> Answer:
        name = f"{self._id}_tool_call_{place}" if choice.index == 0 else f"{self._id}_{choice.index}_tool_call_{place}"
        return {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _logprobs(self, said: Iterable[Chances]) -> Answer:
        def entry(token: int, logprob: float) -> Answer:
            text = self._texts(token)
            known = None if "\ufffd" in text else list(text.encode())  # a part of a character: its bytes are not known
            return {"token": text, "logprob": _finite(logprob), "bytes": known}

        content = [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.likeliest]} for one in said
        ]
        return {"content": content, "refusal": None}


class Completions:
    """The form of /v1/completions."""

    def __init__(self, request_id: str, model: str, tokenizer: Any, suffix: str = "") -> None:
        now = int(time.time())
        self._base = {"id": request_id, "created": now, "model": model, "object": "text_completion"}
        self._suffix, self._texts = suffix, _Texts(tokenizer)

    def whole(self, choices: Sequence[Any], used: Answer) -> Answer:
        """The answer to a request that does not stream."""
        answers = []
        for choice in choices:
            said = choice.said() if choice.wants_chances else None
            answers.append(self._choice(choice.index, "".join(choice.parts) + self._suffix, choice.finish, said))
        return {**self._base, "choices": answers, "usage": used}

    def first(self, index: int) -> Answer | None:
        """The first chunk of a choice: there is none."""
        return None

    def part(self, choice: Any, part: Any, said: list[Chances]) -> Answer:
        """A chunk with a part of a choice."""
        return {**self._base, "choices": [self._choice(choice.index, part, None, said or None)]}

    def last(self, choice: Any, said: list[Chances], used: Answer | None) -> Answer:
        """The chunk that ends a choice."""
        chunk = {**self._base, "choices": [self._choice(choice.index, self._suffix, choice.finish, said or None)]}
        return chunk if used is None else {**chunk, "usage": used}

    def usage(self, used: Answer) -> Answer:
        """The chunk with the numbers of tokens."""
        return {**self._base, "choices": [], "usage": used}

    def _choice(self, index: int, text: str, finish: str | None, said: list[Chances] | None) -> Answer:
        choice: Answer = {"index": index, "text": text, "finish_reason": finish}
        if said is not None:
            choice["logprobs"] = {
                "tokens": [self._texts(one.token) for one in said],
                "token_logprobs": [_finite(one.logprob) for one in said],
                "top_logprobs": [
                    {self._texts(token): _finite(logprob) for token, logprob in one.likeliest} for one in said
                ],
                "text_offset": [one.start for one in said],
            }
        return choice


class _Texts:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode: Callable[..., str] = tokenizer.decode
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([token], skip_special_tokens=False)
        return self._known[token]


def _finite(logprob: float) -> float:
    """A log probability that JSON can hold; a probability of 0 is -9999, as OpenAI says."""
    return max(logprob, -9999.0)
