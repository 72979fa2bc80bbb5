"""The application: routes and error handlers.

GET  /                                          a page to try the model in a browser
GET  /health  /metrics  /v1/models  /v1/models/{id}
POST /v1/chat/completions  /v1/completions  /v1/responses  /v1/embeddings      OpenAI's API, including streaming
POST /tokenize  /detokenize                     as vLLM and llama.cpp have them
GET  /calibration/status  POST /calibration/start  /stop  /apply  /rollback      see live.py
POST /re_isq {"isq": "q8_0"}                    change the format of the running model; the answer is the report. With
                                                "source": "stored" it starts from the quantized weights
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from . import other_requests, requests
from .body import Body, parse
from .connection import App, Connection, error_body
from .embeddings import Embeddings
from .handlers import Chat, Completions
from .live import Live, check_apply, check_nothing
from .memory import release_memory
from .page import Page
from .prompts import check_template, rendered
from .reach import Reach
from .responses import Responses
from .served import ApiError, GenerationError, Served

_LARGE = 1 << 20  # bytes of a body after which memory is given back to the system


class Api:
    """The endpoints of one served model."""

    def __init__(self, served: Served, save_dir: Path | None) -> None:
        self.served = served
        self.live = Live(served, save_dir)
        self.chat = Chat(served, served.state)
        self.completions = Completions(served, served.state)
        self.responses = Responses(served, served.state)
        self.embeddings = Embeddings(served)
        self.created = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/", Page().__call__),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.post(self.chat, requests.check_chat), methods=["POST"]),
            Route("/v1/completions", self.post(self.completions, requests.check_completion), methods=["POST"]),
            Route(
                "/v1/responses", self.post(self.responses, other_requests.check_response, done=False), methods=["POST"]
            ),
            Route("/v1/embeddings", self.post(self.embeddings, other_requests.check_embeddings), methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/metrics", self.metrics),
            Route("/calibration/status", self.calibration),
            Route("/calibration/start", self.live_call(self.live.start), methods=["POST"]),
            Route("/calibration/stop", self.live_call(self.live.stop), methods=["POST"]),
            Route("/calibration/apply", self.apply, methods=["POST"]),
            Route("/calibration/rollback", self.live_call(self.live.rollback), methods=["POST"]),
            Route("/re_isq", self.re_isq, methods=["POST"]),
        ]

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "isq": self.served.loaded.isq, "requantizing": self.served.requantizing})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def model(self, request: Request) -> Response:
        self.served.check_name(request.path_params["name"])
        return JSONResponse(self._describe())

    def _describe(self) -> dict[str, Any]:
        loaded = self.served.loaded
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.created,
            "owned_by": "isqtorch",
            "isq": loaded.isq,
            "chat": bool(loaded.chat_writer.chat_template),
            "images": loaded.sees,
            "context_length": self.served.context,
        }

    async def re_isq(self, request: Request) -> Response:
        isq, source = await self._checked(request, other_requests.check_re_isq)
        report = await self.served.requantize(isq, source)
        return JSONResponse(report.to_dict())

    async def calibration(self, _: Request) -> Response:
        return JSONResponse(self.live.status())

    def live_call(self, call: Callable[[], Any]) -> Callable[[Request], Any]:
        """An endpoint of the calibration that takes no fields."""

        async def endpoint(request: Request) -> Response:
            await self._checked(request, check_nothing)
            return JSONResponse(await call())

        return endpoint

    async def apply(self, request: Request) -> Response:
        report = await self.live.apply(*await self._checked(request, check_apply))
        return JSONResponse(report.to_dict())

    async def metrics(self, _: Request) -> Response:
        scheduler = self.served.generations.scheduler
        text = scheduler.measures.text({"running": scheduler.running, "waiting": scheduler.waiting})
        return Response(text, media_type="text/plain; version=0.0.4")

    async def tokenize(self, request: Request) -> Response:
        body = await self._checked(request, _after(other_requests.check_tokenize))
        served = self.served
        served.check_name(body.get("model"))

        def read() -> list[int]:
            if "messages" in body:
                check_template(served, body)
                ids: list[int] = rendered(served, body["messages"], body)["input_ids"][0].tolist()
                return ids
            special = body.get("add_special_tokens", True)
            tokens: list[int] = served.loaded.tokenizer(body["prompt"], add_special_tokens=special, verbose=False)[
                "input_ids"
            ]
            return tokens

        tokens = await served.reader.async_submit(read)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": served.context})

    async def detokenize(self, request: Request) -> Response:
        body = await self._checked(request, _after(other_requests.check_detokenize))
        served = self.served
        served.check_name(body.get("model"))
        size = len(served.loaded.tokenizer)
        outside = next((token for token in body["tokens"] if token >= size), None)
        if outside is not None:
            raise ApiError(400, f"tokens has {outside}; the tokenizer has {size}")
        text = await served.reader.async_submit(served.loaded.tokenizer.decode, body["tokens"])
        return JSONResponse({"prompt": text, "content": text})

    def post(self, handler: Any, check: Callable[[Body], None], *, done: bool = True) -> Callable[[Request], Any]:
        """An endpoint that checks the body and calls a handler. `done`: a stream ends with OpenAI's last line."""

        async def endpoint(request: Request) -> Response:
            body = await self._checked(request, _after(check))
            response: Response = await handler.handle_request(body, f"isqtorch-{uuid.uuid4().hex}")
            if done and isinstance(response, StreamingResponse):
                response.body_iterator = _ended(response.body_iterator)
            return response

        return endpoint

    async def _checked(self, request: Request, check: Callable[[Body], Any]) -> Any:
        """What `check` returns for the body. Both can take long for a large body, so the reading thread does them."""
        raw = [part async for part in request.stream()]  # `request.body()` would keep it until the answer

        def read() -> Any:
            large = sum(map(len, raw)) > _LARGE
            try:
                return check(parse(b"".join(raw)))
            finally:
                raw.clear()
                if large:
                    release_memory()

        return await self.served.reader.async_submit(read)


def _after(check: Callable[[Body], None]) -> Callable[[Body], Body]:
    """A function that checks a body and returns it."""

    def checked(body: Body) -> Body:
        check(body)
        return body

    return checked


async def _ended(parts: Any) -> AsyncIterator[str]:
    """The stream, followed by OpenAI's last line, which some clients wait for."""
    async for part in parts:
        yield part
    yield "data: [DONE]\n\n"


def bad_request(_: Request, error: Exception) -> Response:
    """Status 400 for errors of parsing and checking a request. Errors of generating have their own handler."""
    reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
    return JSONResponse(error_body(400, reason), status_code=400)


def api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error_body(error.status, str(error), error.code), status_code=error.status)


def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_body(error.status_code, str(error.detail))
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def internal_error(_: Request, error: Exception) -> Response:
    message = str(error) if isinstance(error, GenerationError) else type(error).__name__
    return JSONResponse(error_body(500, message), status_code=500)


def build_app(served: Served, reach: Reach, save_dir: Path | None = None) -> App:
    """The ASGI application that serves a model to those whom `reach` allows. Clients may write models into `save_dir`."""
    wrong: tuple[type[Exception], ...] = (ValueError, TypeError, KeyError, TemplateError)
    app = Starlette(
        routes=Api(served, save_dir).routes(),
        exception_handlers={
            **dict.fromkeys(wrong, bad_request),
            ApiError: api_error,
            HTTPException: _http,
            GenerationError: internal_error,
            Exception: internal_error,
        },
    )
    return Connection(app, reach)
