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

from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from isqtorch.app.model import LoadedModel
from isqtorch.report.report import QuantReport

from .connection import TICKET, Ticket
from .grammar import Forms
from .replies import Streamer
from .rows import Job, Penalties
from .scheduler import Scheduler
from .wishes import Wishes
from .worker import Worker

BATCH = 8  # replies at once; the kernels for CPUs give each of up to 8 rows the same bits as alone
PREFIX_BYTES = 256 << 20
_NO_CONTEXT = 32_768  # tokens of prompt and reply for a model that names no limit
_PIECE = 32_768  # characters of a long prompt that are read at a time, to find out whether it can fit
_CUT = 16  # tokens that cutting a text into pieces adds at most, per piece

Finish = Literal["stop", "length", "tool_calls"]
"""Why a reply ended: a stop string or the end of the text, the limit of tokens, or it calls tools."""


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
        forms: what makes rules for replies of a given form.
        busy: says why /re_isq has to wait for something else; None: it need not.
        closing: whether the server is about to end; replies then end at their next token.
    """

    def __init__(self, loaded: LoadedModel, name: str, batch: int = BATCH, prefix_bytes: int = PREFIX_BYTES) -> None:
        self.loaded, self.name = loaded, name
        self.names = {name, loaded.source, "default"}
        self.reader = Worker("isqtorch-read")
        self.generations = Generations(self, batch, prefix_bytes)
        self.forms = Forms(loaded.tokenizer)
        self.state = GenerationState()
        self.requantizing = self.closing = False
        self.busy: Callable[[], str | None] = lambda: None

    @property
    def context(self) -> int:
        """Largest number of tokens of prompt and reply together."""
        return self.loaded.context or _NO_CONTEXT

    def check_continues(self) -> None:
        """ApiError if the model does not continue texts."""
        if not self.loaded.continues:
            raise ApiError(400, f"{self.name!r} does not continue texts; it has /v1/embeddings only")

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
        """ApiError for a prompt that is empty or too long. Limits the reply, if there is one, to the rest of the context."""
        if tokens == 0:
            raise ApiError(400, "the prompt is empty: it has no tokens")
        if tokens >= self.context:
            raise self._too_long(str(tokens))
        if config is not None:
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
        busy = self.busy()
        if busy is not None:
            raise ApiError(409, busy)
        report: QuantReport = await self.change(isq, partial(self.loaded.requantize, isq, source))
        return report

    async def change(self, isq: str | None, call: Callable[[], Any]) -> Any:
        """Let a call change the weights after the requests before this one are answered; errors as `requantize`.

        Args:
            isq: the format that the call makes; None: that of the checkpoint.
            call: it runs on the generating thread, and leaves the model unchanged if it fails.
        """
        try:
            if isq is not None:
                self.loaded.check(isq)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        if self.requantizing:
            raise ApiError(409, "the model is changing its format already; ask again when that is done")
        self.requantizing = True
        try:
            return await asyncio.wrap_future(self.generations.submit(call))
        except Exception as error:  # after any error the server continues with the present model
            raise ApiError(500, f"the format is {self.loaded.isq}: {type(error).__name__}: {error}") from error
        finally:
            self.requantizing = False

    def close(self) -> None:
        """End all replies at their next token; those that wait do not begin."""
        self.closing = True


class Generations(GenerateManager):  # type: ignore[misc]  # transformers is not typed
    """The queue of replies. transformers' handler of /v1/responses uses it as its manager of generation."""

    def __init__(self, served: Served, most: int, prefix_bytes: int) -> None:
        self.served = served
        self.scheduler = Scheduler(lambda: served.loaded.model, served.context, most, prefix_bytes, served.loaded.kv)
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
            loop.call_soon_threadsafe(queue.put_nowait, part)

        def done(error: Exception | None) -> None:
            emit(None if error is None else _StreamError(str(error)))

        wishes: Wishes = TICKET.get().wishes
        return queue, self.add(inputs, gen_config, wishes, parser=response_parser, emit=emit, done=done)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Queue a reply and wait for it: its text, the tokens of the prompt, and its tokens."""
        parts: list[str] = []
        future: Future[None] = Future()

        def done(error: Exception | None) -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(None) if error is None else future.set_exception(error)

        streamer = self.add(inputs, gen_config, TICKET.get().wishes, emit=parts.append, done=done)
        await asyncio.wrap_future(future)
        return "".join(parts), inputs["input_ids"].shape[-1], streamer.tokens

    def add(
        self,
        inputs: Any,
        config: Any,
        wishes: Wishes,
        *,
        emit: Callable[[Any], Any],
        done: Callable[[Exception | None], Any],
        parser: Any = None,
        number: int = 0,
    ) -> Streamer:
        """Queue a reply.

        Args:
            inputs: the prompt.
            config: the generation settings.
            wishes: what else the request wants.
            emit: called with each part, on the generating thread.
            done: called at the end, with the error if there was one, on the generating thread.
            parser: what splits the reply into its parts; None: it is all text.
            number: of the reply, among those to the same prompt.
        """
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

        prompt = inputs["input_ids"].shape[-1]
        rules: list[Callable[[], Any]] = []
        if wishes.frequency or wishes.presence:
            rules.append(partial(Penalties, wishes.frequency, wishes.presence, prompt))
        if wishes.form is not None:
            rules.append(partial(served.forms.rule, wishes.form, served.loaded.model, prompt))
        streamer = Streamer(served.loaded.tokenizer, wishes.stops, parser, emit, cancel)
        seed = None if wishes.seed is None else wishes.seed + number
        ended = partial(_is_over, ticket, served)
        self.scheduler.add(Job(dict(inputs), config, streamer, ended, end, seed, wishes.chances, rules))
        return streamer


def _is_over(ticket: Ticket, served: Served) -> bool:
    """Whether nobody waits for a reply any more."""
    return ticket.gone or served.closing
