"""The served model: what a request may ask of it, and the queue of replies.

One thread reads prompts, so that a long one keeps nobody waiting but those behind it. One thread generates for all
requests, see scheduler.py. A change of format is queued like a request, so no request is lost, and every answer comes
from a single model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

from openai.types import CompletionUsage
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from isqtorch.app.model import LoadedModel
from isqtorch.report.report import QuantReport

from .connection import TICKET, Ticket
from .replies import Streamer
from .rows import Job
from .scheduler import Scheduler
from .worker import Worker

BATCH = 8  # replies at once; the kernels for CPUs give each of up to 8 rows the same bits as alone
PREFIX_BYTES = 256 << 20
_NO_CONTEXT = 32_768  # tokens of prompt and reply for a model that names no limit
_PIECE = 32_768  # characters of a long prompt that are read at a time, to find out whether it can fit
_CUT = 16  # tokens that cutting a text into pieces adds at most, per piece

Finish = Literal["stop", "length"]
"""Why a reply ended: a stop string or the end of the text, or the limit of tokens."""


class ApiError(Exception):
    """An error that is sent to the client, with its HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class GenerationError(RuntimeError):
    """Generating failed. The text has no double quotes, because transformers puts it between them in a stream."""

    def __init__(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        super().__init__(" ".join(text.split()).replace("\\", "/").replace('"', "'"))


class Served:
    """The served model, with the interface of transformers' manager of many models.

    Attributes:
        name: its id in /v1/models.
        names: all names that a request may use for it.
        reader: the thread that parses bodies and reads prompts.
        generations: the queue of replies and changes of the format.
        closing: whether the server is about to end; replies then end at their next token.
    """

    def __init__(self, loaded: LoadedModel, name: str, batch: int = BATCH, prefix_bytes: int = PREFIX_BYTES) -> None:
        self.loaded, self.name = loaded, name
        self.names = {name, loaded.source, "default"}
        self.reader = Worker("isqtorch-read")
        self.generations = Generations(self, batch, prefix_bytes)
        self.state = GenerationState()
        self.requantizing = self.closing = False

    @property
    def context(self) -> int:
        """Largest number of tokens of prompt and reply together."""
        return self.loaded.context or _NO_CONTEXT

    def check_name(self, name: str | None) -> None:
        """ApiError 404 if a request names another model. The name may be missing."""
        if name is not None and name not in self.names:
            raise ApiError(404, f"model {name!r} does not exist here; this server has {self.name!r}", "model_not_found")

    def check_length(self, text: str) -> None:
        """ApiError for a text that is far too long for the context, found without reading all of it."""
        if len(text) <= _PIECE:
            return
        tokens = 0
        for start in range(0, len(text), _PIECE):
            piece = self.loaded.tokenizer(text[start : start + _PIECE], add_special_tokens=False, verbose=False)
            tokens += max(len(piece["input_ids"]) - _CUT, 0)
            if tokens >= self.context:
                raise self._too_long(f"more than {tokens}")

    def admit(self, tokens: int, config: Any) -> None:
        """ApiError for a prompt that is empty or too long. Limits the reply to the rest of the context."""
        if tokens == 0:
            raise ApiError(400, "the prompt is empty: it has no tokens")
        if tokens >= self.context:
            raise self._too_long(str(tokens))
        config.max_new_tokens = min(config.max_new_tokens, self.context - tokens)

    def _too_long(self, tokens: str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {tokens} tokens; the context of {self.name!r} is {self.context}, reply included. Send a shorter one.",
            "context_length_exceeded",
        )

    async def requantize(self, isq: str, source: str | None = None) -> QuantReport:
        """Change the format after the requests before this one are answered; later requests wait.

        Raises:
            ApiError: 400 for an unknown format, 409 during another change, 500 if the change failed. The model is
                unchanged.
        """
        try:
            self.loaded.check(isq)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        if self.requantizing:
            raise ApiError(409, "the model is changing its format already; ask again when that is done")
        self.requantizing = True
        try:
            report: QuantReport = await asyncio.wrap_future(
                self.generations.submit(self.loaded.requantize, isq, source)
            )
            return report
        except Exception as error:  # after any error the server continues with the present model
            raise ApiError(500, f"the format stays {self.loaded.isq}: {type(error).__name__}: {error}") from error
        finally:
            self.requantizing = False

    def close(self) -> None:
        """End all replies at their next token; those that wait do not begin."""
        self.closing = True


class Generations(GenerateManager):  # type: ignore[misc]  # transformers is not typed
    """The queue of replies, as transformers' handlers use it."""

    def __init__(self, served: Served, most: int, prefix_bytes: int) -> None:
        self.served = served
        self.scheduler = Scheduler(lambda: served.loaded.model, served.context, most, prefix_bytes)
        self._thread = self.scheduler  # what transformers submits calls to

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Streamer]:
        """Queue a reply whose parts come as they are generated."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()

        def emit(part: Any) -> None:
            if streamer.stopped:
                gen_config.max_new_tokens = None  # else the handler takes a stop in the last token for the limit
            loop.call_soon_threadsafe(queue.put_nowait, part)

        def done(error: Exception | None) -> None:
            emit(None if error is None else _StreamError(str(error)))

        streamer = self.add(processor, inputs, gen_config, response_parser, emit, done)
        return queue, streamer

    async def generate_whole(
        self, processor: Any, inputs: Any, gen_config: Any, response_parser: Any = None
    ) -> tuple[list[Any], CompletionUsage, Finish]:
        """Queue a reply and wait for it: its parts, the numbers of tokens, and why it ended."""
        parts: list[Any] = []
        future: Future[None] = Future()

        def done(error: Exception | None) -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(None) if error is None else future.set_exception(error)

        streamer = self.add(processor, inputs, gen_config, response_parser, parts.append, done)
        await asyncio.wrap_future(future)
        prompt, new = inputs["input_ids"].shape[-1], streamer.total_tokens
        usage = CompletionUsage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)
        ended = streamer.stopped or new < gen_config.max_new_tokens
        return parts, usage, "stop" if ended else "length"

    def add(
        self,
        tokenizer: Any,
        inputs: Any,
        config: Any,
        parser: Any,
        emit: Callable[[Any], Any],
        done: Callable[[Exception | None], Any],
    ) -> Streamer:
        """Queue a reply; `emit` and `done` are called on the generating thread."""
        ticket, served = TICKET.get(), self.served

        def cancel() -> None:
            ticket.gone = True

        def end(error: Exception | None) -> None:
            if error is not None:
                error = GenerationError(error)
            elif served.closing:  # a reply that was cut off must not look like a whole one
                error = ApiError(503, "the server is shutting down")
            elif ticket.gone:
                error = GenerationError(ConnectionAbortedError("the client hung up"))
            done(error)

        streamer = Streamer(tokenizer, ticket.stops, parser, emit, cancel)
        ended = partial(_is_over, ticket, served)
        self.scheduler.add(Job(dict(inputs), config, streamer, ended, end, ticket.seed))
        return streamer


def _is_over(ticket: Ticket, served: Served) -> bool:
    """Whether nobody waits for a reply any more."""
    return ticket.gone or served.closing
