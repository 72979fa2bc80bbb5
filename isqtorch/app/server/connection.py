"""An ASGI wrapper around the application: refuses foreign requests, limits bodies, and notices closed connections.

It first reads the whole body, within limits of size and time. Then, while the handler works, it waits for the client to
close the connection. The handler finds out through `TICKET`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .reach import Reach, Refusal
from .wishes import Wishes

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 8 << 20  # a prompt of a million tokens is about 4 MB
MAX_HELD_BYTES = 64 << 20  # of all bodies together
MAX_REQUESTS = 100  # at once, those that wait for their turn included
PAUSE_SECONDS = 10  # that a client may take to send the next part of a body
BODY_SECONDS = 60  # that a client may take to send a whole body
MAX_MESSAGE = 1000  # characters of an error; errors repeat what the client sent
_DRAINED = 8  # a body up to this many times the limit is read to its end, so that the client can see the error


@dataclass
class Ticket:
    """State of a request, shared with the thread that generates for it."""

    gone: bool = False  # the client closed the connection or has its answer
    wishes: Wishes = field(default_factory=Wishes)  # of a request that a handler of transformers answers


TICKET: ContextVar[Ticket] = ContextVar("isqtorch_ticket")


class Connection:
    """The wrapper.

    Args:
        app: the application.
        reach: who may use the server.
        max_body: largest body in bytes; larger ones get status 413.
    """

    def __init__(self, app: App, reach: Reach, max_body: int = MAX_BODY_BYTES) -> None:
        self.app, self.reach, self.max_body = app, reach, max_body
        self._requests = 0  # at present, without GET
        self._held = 0  # bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; uvicorn is told to offer no WebSocket
            await self.app(scope, receive, send)
            return
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        counted = int(scope["method"] not in ("GET", "HEAD"))
        held = [0]  # bytes that this request holds
        self._requests += counted
        try:
            try:
                # a browser sends no key with its first request; the page holds nothing that a key protects
                self.reach.check(scope["headers"], keyed=counted == 1 or scope["path"] != "/")
                if counted and self._requests > MAX_REQUESTS:
                    raise Refusal(503, f"{MAX_REQUESTS} requests are waiting already; try again later")
                body = await self._body(scope["headers"], receive, held)
            except Refusal as refusal:
                await _answer(send, refusal)
                return
            await self._run(scope, body, receive, answer)
        except asyncio.CancelledError:  # by uvicorn, which would log a traceback
            if not begun:
                await _answer(send, Refusal(503, "the server is shutting down"))
        finally:
            self._requests -= counted
            self._held -= held[0]

    async def _body(self, headers: list[tuple[bytes, bytes]], receive: Receive, held: list[int]) -> bytes:
        """The whole body.

        Most clients read the answer only after they have sent the whole body. So a body that is too large is read too,
        up to a second limit, and dropped.
        """
        named = {name.lower(): value for name, value in headers}
        length = named.get(b"content-length", b"0")
        announced = int(length) if length.isdigit() and len(length) < 20 else 0
        too_large = Refusal(413, f"the body is larger than {self.max_body} bytes, the limit of this server")
        if announced > self.max_body and b"expect" in named:
            raise too_large  # the client waits for permission to send
        body = bytearray()
        size = 0
        refusal = too_large if announced > self.max_body else None
        deadline = time.monotonic() + BODY_SECONDS
        while size <= _DRAINED * self.max_body:
            message = await _within(receive, min(PAUSE_SECONDS, deadline - time.monotonic()))
            if message["type"] == "http.disconnect":
                return b""  # the client is gone; the answer will be dropped
            part = message.get("body", b"")
            size += len(part)
            if size > self.max_body:
                refusal = too_large
            elif refusal is None and self._held + len(part) > MAX_HELD_BYTES:
                refusal = Refusal(503, "the requests under way have used up the memory for bodies; try again later")
            if refusal is None:
                body += part
                self._held += len(part)
                held[0] += len(part)
            else:
                body.clear()
            if not message.get("more_body"):
                break
        if refusal is not None:
            raise refusal
        return bytes(body)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        ticket = Ticket()
        TICKET.set(ticket)  # each request runs in its own task, so it has its own context
        hung_up = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body  # the application decides how long it lives

        async def replay() -> Message:
            if unread:
                return unread.pop()
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            ticket.gone = True
            hung_up.set()

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, replay, send)
        finally:
            ticket.gone = True  # answered or cancelled: generation for it can stop
            watcher.cancel()


async def _within(receive: Receive, seconds: float) -> Message:
    try:
        return await asyncio.wait_for(receive(), max(seconds, 0))
    except asyncio.TimeoutError:
        raise Refusal(408, "the request was not sent in time") from None


async def _answer(send: Send, refusal: Refusal) -> None:
    """Send an error of this layer in the common form of the server's errors."""
    status = refusal.status
    body = json.dumps(error_body(status, str(refusal))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The body of an error in the form of OpenAI's API, which its clients show."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}..."
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
