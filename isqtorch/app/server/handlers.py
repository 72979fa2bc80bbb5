"""/v1/chat/completions and /v1/completions.

Of transformers' handlers these use the reading of messages, the parsing of thoughts and tool calls, and the generation
settings of a request. Written here, because transformers' handlers do not have it: several prompts and choices, prompts
as token ids, log probabilities, stop strings that are not part of the text, OpenAI's penalties, forms of replies, and
the limits. `transformers.cli.serving` is not a public interface; test_server.py notices if it changes.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import ToolCall, build_response_parser

from . import answers
from .connection import TICKET, error_body
from .prompts import check_template, rendered, tokens_of
from .replies import Chances
from .served import ApiError, Finish, Served
from .wishes import Wishes, set_sampling, wishes_of

MAX_CHOICES = 64  # replies to one request


class Choice:
    """One reply to a request, while it is generated and after.

    Attributes:
        index: its number in the answer.
        prompt: tokens of its prompt.
        parts: what was emitted.
        calls: the number of tool calls among the parts that were written to a stream.
    """

    def __init__(self, index: int, inputs: Any, config: Any, wishes: Wishes) -> None:
        self.index, self.inputs, self.config = index, inputs, config
        self.prompt = inputs["input_ids"].shape[-1]
        self.parts: list[Any] = []
        self.calls, self.wants_chances = 0, wishes.chances is not None
        self.streamer: Any = None

    @property
    def finish(self) -> Finish:
        """Why it ended."""
        if any(isinstance(part, ToolCall) for part in self.parts):
            return "tool_calls"
        ended = self.streamer.stopped or self.made < self.config.max_new_tokens
        return "stop" if ended else "length"

    @property
    def made(self) -> int:
        """Tokens of the reply."""
        made: int = self.streamer.total_tokens
        return made

    def said(self) -> list[Chances]:
        """Take the log probabilities that have come since the last call."""
        said = []
        while self.streamer.said:
            said.append(self.streamer.said.popleft())
        return said


class _OneModel:
    """What both endpoints share."""

    model_manager: Served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """Read the prompts beside the event loop, then generate."""
        served = self.model_manager
        served.check_continues()
        served.check_name(body.get("model"))
        wishes = wishes_of(body)
        form, stream, options = self._form(body, request_id), body.get("stream"), body.pop("stream_options", None) or {}
        prompts, parser = await served.reader.async_submit(self._read, body, wishes)
        if len(prompts) * wishes.n > MAX_CHOICES:
            raise ApiError(400, f"{len(prompts)} prompts with n = {wishes.n}: a request can have {MAX_CHOICES} replies")
        config = self._build_generation_config(body, served.loaded.model.generation_config)  # type: ignore[attr-defined]
        set_sampling(config, body)
        if wishes.form is not None and (config.num_beams or 1) > 1:
            raise ApiError(400, "this model searches with beams, which cannot keep to a form")
        choices: list[Choice] = []
        for inputs in prompts:
            own = copy.deepcopy(config)
            served.admit(inputs["input_ids"].shape[-1], own)
            choices += [Choice(len(choices) + i, inputs, own, wishes) for i in range(wishes.n)]
        events = self._begin(choices, wishes, parser)
        if stream:
            parts = self._streamed(choices, events, form, bool(options.get("include_usage")))
            return StreamingResponse(parts, media_type="text/event-stream")
        remaining = len(choices)
        while remaining:
            _, part = await events.get()
            if isinstance(part, Exception):
                TICKET.get().gone = True  # the other replies have no reader
                raise part
            remaining -= part is None
        return JSONResponse(form.whole(choices, _used(choices)))

    def _begin(self, choices: list[Choice], wishes: Wishes, parser: Any) -> asyncio.Queue[tuple[Choice, Any]]:
        """Queue all replies. The events are their parts, and None or an error at their end."""
        served, loop = self.model_manager, asyncio.get_running_loop()
        events: asyncio.Queue[tuple[Choice, Any]] = asyncio.Queue()
        for choice in choices:

            def emit(part: Any, choice: Choice = choice) -> None:
                choice.parts.append(part)
                loop.call_soon_threadsafe(events.put_nowait, (choice, part))

            def done(error: Exception | None, choice: Choice = choice) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (choice, error))

            choice.streamer = served.generations.add(
                choice.inputs,
                choice.config,
                wishes,
                parser=parser and parser(choice.inputs),
                emit=emit,
                done=done,
                number=choice.index % wishes.n,
            )
        return events

    async def _streamed(
        self, choices: list[Choice], events: asyncio.Queue[tuple[Choice, Any]], form: Any, count: bool
    ) -> AsyncIterator[str]:
        """The events as text. The numbers of tokens come with the last choice, or, if asked for, in a chunk of their own."""
        for choice in choices:
            first = form.first(choice.index)
            if first is not None:
                yield answers.sse(first)
        remaining = len(choices)
        while remaining:
            choice, part = await events.get()
            if isinstance(part, Exception):
                TICKET.get().gone = True
                yield answers.sse(error_body(getattr(part, "status", 500), str(part)))
                return
            if part is None:
                remaining -= 1
                used = _used(choices) if remaining == 0 and not count else None
                yield answers.sse(form.last(choice, choice.said(), used))
            else:
                yield answers.sse(form.part(choice, part, choice.said()))
                choice.calls += isinstance(part, ToolCall)
        if count:
            yield answers.sse(form.usage(_used(choices)))

    def _read(self, body: dict[str, Any], wishes: Wishes) -> tuple[list[Any], Any]:
        """The tokens of the prompts, and what makes parsers for their replies; runs on the reading thread."""
        served = self.model_manager
        if wishes.form is not None:  # an error of the form is found before anything is generated
            served.forms.rule(wishes.form, served.loaded.model, 0)
        return self._inputs(body), self._parser(body)

    def _inputs(self, body: dict[str, Any]) -> list[Any]:
        """The tokens of the prompts."""
        raise NotImplementedError

    def _form(self, body: dict[str, Any], request_id: str) -> Any:
        """What writes the answer."""
        raise NotImplementedError

    def _parser(self, body: dict[str, Any]) -> Any:
        """What makes a parser that splits a reply into its parts; None: it is all text."""
        return None


class Chat(_OneModel, ChatCompletionHandler):  # type: ignore[misc]
    """/v1/chat/completions."""

    def _inputs(self, body: dict[str, Any]) -> list[Any]:
        served = self.model_manager
        check_template(served, body)
        vocabulary = served.loaded.model.config.get_text_config().vocab_size
        outside = [token for token in body.get("logit_bias", {}) if int(token) >= vocabulary]
        if outside:
            raise ApiError(400, f"logit_bias names token {outside[0]}; the vocabulary has {vocabulary}")
        return [rendered(served, body["messages"], body)]

    def _form(self, body: dict[str, Any], request_id: str) -> Any:
        return answers.Chat(request_id, self.model_manager.name, self.model_manager.loaded.tokenizer)

    def _parser(self, body: dict[str, Any]) -> Any:
        loaded, tools = self.model_manager.loaded, body.get("tools")
        return lambda inputs: build_response_parser(loaded.tokenizer, loaded.model, inputs["input_ids"], tools=tools)


class Completions(_OneModel, CompletionHandler):  # type: ignore[misc]
    """/v1/completions."""

    def _inputs(self, body: dict[str, Any]) -> list[Any]:
        return [tokens_of(self.model_manager, prompt) for prompt in body["prompt"]]

    def _form(self, body: dict[str, Any], request_id: str) -> Any:
        served = self.model_manager
        return answers.Completions(request_id, served.name, served.loaded.tokenizer, body.get("suffix", ""))


def _used(choices: list[Choice]) -> dict[str, int]:
    """The numbers of tokens of all replies; the tokens of a prompt count once."""
    prompts = {id(choice.inputs): choice.prompt for choice in choices}
    return answers.usage(sum(prompts.values()), sum(choice.made for choice in choices))
