"""An ASGI wrapper around the application: limits bodies, refuses foreign web pages, and notices closed connections.

It first reads the whole body, up to a limit. Then, while the handler works, it waits for the client to close the
connection. The handler finds out through `TICKET`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 8 << 20  # a prompt of a million tokens is about 4 MB
_DRAINED = 8  # a body up to this many times the limit is read to its end, so that the client can see the error


@dataclass
class Ticket:
    """State of a request, shared with the thread that generates for it."""

    gone: bool = False  # the client closed the connection or has its answer
    seed: int | None = None


TICKET: ContextVar[Ticket] = ContextVar("isqtorch_ticket")


class Connection:
    """The wrapper.

    Args:
        app: the application.
        hosts: names allowed in the Host header, without port; None: any. On the loopback interface this keeps out web
            pages that rebind their own name to it (DNS rebinding).
        max_body: largest body in bytes; larger ones get status 413.
    """

    def __init__(self, app: App, hosts: frozenset[str] | None, max_body: int = MAX_BODY_BYTES) -> None:
        self.app, self.hosts, self.max_body = app, hosts, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(headers)
        if refusal is not None:
            await _answer(send, 403, refusal)
            return
        body = await self._body(headers, receive)
        if body is None:
            await _answer(send, 413, f"the body is larger than {self.max_body} bytes, the limit of this server")
            return
        await self._run(scope, body, receive, send)

    def _refusal(self, headers: dict[str, str]) -> str | None:
        """Reason to refuse a request, or None. Any web page can make a browser send requests to a local server."""
        host = headers.get("host", "")
        if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
            return f"the Host header names {host!r}; this server answers to {', '.join(sorted(self.hosts))}"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return f"requests of web pages from elsewhere ({origin}) are not served"
        return None

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The whole body; None if it is too large.

        Most clients read the answer only after they have sent the whole body. So a body that is too large is read too,
        up to a second limit, and dropped.
        """
        length = headers.get("content-length", "0")
        announced = int(length) if length.isdecimal() else 0
        if announced > self.max_body and "expect" in headers:
            return None  # the client waits for permission to send
        parts: list[bytes] = []
        size = 0
        while size <= _DRAINED * self.max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""  # the client is gone; the answer will be dropped
            size += len(message.get("body", b""))
            if size > self.max_body or announced > self.max_body:
                parts.clear()
            else:
                parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        return b"".join(parts) if size <= self.max_body else None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        ticket = Ticket()
        TICKET.set(ticket)  # each request runs in its own task, so it has its own context
        hung_up = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

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


async def _answer(send: Send, status: int, message: str) -> None:
    """Send an error of this layer in the common form of the server's errors."""
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The body of an error in the form of OpenAI's API, which its clients show."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
