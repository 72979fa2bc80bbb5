"""The served model: what a request may ask of it, and the queue of replies.

One thread reads prompts, so that a long one keeps nobody waiting but those behind it. One thread generates, one request
after the other in the order of arrival. A change of format is queued in the same way, so no request is lost, and every
answer comes from a single model.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import torch
from openai.types import CompletionUsage
from torch import Tensor
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from isqtorch.app.model import LoadedModel
from isqtorch.report.report import QuantReport

from .connection import TICKET
from .memory import release_memory
from .replies import Streamer
from .worker import Worker

_NO_CONTEXT = 32_768  # tokens of prompt and reply for a model that names no limit
_LONG = 512  # tokens of a prompt after which memory is given back to the system
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

    def __init__(self, loaded: LoadedModel, name: str) -> None:
        self.loaded, self.name = loaded, name
        self.names = {name, loaded.source, "default"}
        self.reader = Worker("isqtorch-read")
        self.generations = Generations(self)
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
            report: QuantReport = await self.generations.async_submit(self.loaded.requantize, isq, source)
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

    def __init__(self, served: Served) -> None:
        self.served = served
        self._thread = Worker("isqtorch-generate")  # `_thread` is what transformers submits calls to

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
        turn = _Turn(self.served)

        def emit(part: Any) -> None:
            if turn.stopped:
                gen_config.max_new_tokens = None  # else the handler takes a stop in the last token for the limit
            loop.call_soon_threadsafe(queue.put_nowait, part)

        def run() -> None:
            try:
                turn.generate(inputs, gen_config)
                emit(None)  # the end of a whole reply
            except Exception as error:
                emit(_StreamError(str(error)))

        streamer = turn.streamer(processor, response_parser, emit)
        self.submit(run)
        return queue, streamer

    async def generate_whole(
        self, processor: Any, inputs: Any, gen_config: Any, response_parser: Any = None
    ) -> tuple[list[Any], CompletionUsage, Finish]:
        """Queue a reply and wait for it: its parts, the numbers of tokens, and why it ended."""
        parts: list[Any] = []
        turn = _Turn(self.served)
        streamer = turn.streamer(processor, response_parser, parts.append)
        await self.async_submit(turn.generate, inputs, gen_config)
        prompt, new = inputs["input_ids"].shape[-1], streamer.total_tokens
        usage = CompletionUsage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)
        ended = streamer.stopped or new < gen_config.max_new_tokens
        return parts, usage, "stop" if ended else "length"


class _Turn:
    """One reply: uses the model, the seed and the state of the connection when its turn comes."""

    def __init__(self, served: Served) -> None:
        self.served, self.ticket = served, TICKET.get()
        self._streamer: Streamer | None = None

    def streamer(self, tokenizer: Any, parser: Any, emit: Any) -> Streamer:
        """The streamer of this reply, which must be made before it is generated."""

        def cancel() -> None:
            self.ticket.gone = True

        self._streamer = Streamer(tokenizer, self.ticket.stops, parser, emit, cancel)
        return self._streamer

    @property
    def stopped(self) -> bool:
        return self._streamer is not None and self._streamer.stopped

    def generate(self, inputs: Any, config: Any) -> None:
        """Generate with the present model; runs on the generating thread."""
        assert self._streamer is not None
        if self.ticket.gone:
            raise GenerationError(ConnectionAbortedError("the client hung up"))
        self._check_open()
        if self.ticket.seed is not None:
            torch.manual_seed(self.ticket.seed)
        in_beams = (config.num_beams or 1) > 1  # generate takes no streamer then
        try:
            tokens: Tensor = self.served.loaded.model.generate(
                **inputs,
                generation_config=config,
                streamer=None if in_beams else self._streamer,
                stopping_criteria=[self._ended],
            )
            if in_beams:
                prompt = inputs["input_ids"].shape[-1]
                for part in (tokens[0, :prompt], *tokens[0, prompt:]):
                    self._streamer.put(part)
                self._streamer.end()
        except Exception as error:
            raise GenerationError(error) from error
        finally:
            if inputs["input_ids"].shape[-1] > _LONG:
                release_memory()
        self._check_open()

    def _ended(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """A stopping criterion: a stop string was found, the client is gone, or the server ends."""
        ended = self.stopped or self.ticket.gone or self.served.closing
        return torch.full((len(ids),), ended, dtype=torch.bool, device=ids.device)

    def _check_open(self) -> None:
        """ApiError if the server ends: a reply that was cut off must not look like a whole one."""
        if self.served.closing:
            raise ApiError(503, "the server is shutting down")
