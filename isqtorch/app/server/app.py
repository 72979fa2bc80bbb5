"""The application: routes, error handlers, and running it.

GET  /health  /v1/models  /v1/models/{id}
POST /v1/chat/completions  /v1/completions      OpenAI's API, including streaming
POST /re_isq {"isq": "q8_0"}                    change the format of the running model; the answer is the report. With
                                                "source": "stored" it starts from the quantized weights
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from . import requests
from .connection import App, Connection, error_body
from .handlers import ApiError, Chat, Completions, GenerationError, Served

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_GRACE = 5  # seconds that running replies may take to finish when the server stops


class Api:
    """The endpoints of one served model."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.chat = Chat(served, served.state)
        self.completions = Completions(served, served.state)
        self.created = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.post(self.chat, requests.check_chat), methods=["POST"]),
            Route("/v1/completions", self.post(self.completions, requests.check_completion), methods=["POST"]),
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
            "context_length": loaded.context,
        }

    async def re_isq(self, request: Request) -> Response:
        isq, source = requests.check_re_isq(requests.parse(await request.body()))
        report = await self.served.requantize(isq, source)
        return JSONResponse(report.to_dict())

    def post(self, handler: Any, check: Callable[[requests.Body], None]) -> Callable[[Request], Any]:
        """An endpoint that checks the body and calls one of transformers' handlers."""

        async def endpoint(request: Request) -> Response:
            body = requests.parse(await request.body())
            check(body)
            response: Response = await handler.handle_request(body, f"isqtorch-{uuid.uuid4().hex}")
            if isinstance(response, StreamingResponse):
                response.body_iterator = _ended(response.body_iterator)
            return response

        return endpoint


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


def build_app(served: Served, host: str = "127.0.0.1") -> App:
    """The ASGI application that serves a model.

    Args:
        served: the model.
        host: the address to listen on. On a loopback address only requests with a loopback name as Host are answered.
    """
    wrong: tuple[type[Exception], ...] = (ValueError, TypeError, KeyError, TemplateError)
    app = Starlette(
        routes=Api(served).routes(),
        exception_handlers={
            **dict.fromkeys(wrong, bad_request),
            ApiError: api_error,
            HTTPException: _http,
            GenerationError: internal_error,
            Exception: internal_error,
        },
    )
    return Connection(app, _LOOPBACK if host in _LOOPBACK else None)


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket before the model is loaded, so that a port in use is known at once. Port 0 takes a free port.

    Raises:
        OSError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another --port."
        ) from error
    return sock


def serve(app: App, sock: socket.socket, log_level: str = "warning") -> None:
    """Answer requests until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app, log_level=log_level, access_log=log_level == "info", lifespan="off", timeout_graceful_shutdown=_GRACE
    )
    uvicorn.Server(config).run(sockets=[sock])
