"""Running the application with uvicorn, with limits of time and number for connections.

uvicorn limits the size of headers and the time between two requests. It does not limit the number of connections, nor
the time to send a request or to take the answer. Here it does.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .connection import App

MAX_CONNECTIONS = 200  # at once; the files that a process may open are limited too, on a Mac to 256
HEAD_SECONDS = 10  # for a new connection, or after an answer, until the headers of a request are there
WRITE_SECONDS = 30  # that a client may not take what is written to it
MAX_HEAD_BYTES = 32 << 10  # of the headers of a request
_KEEP_ALIVE = 5  # seconds that an idle connection is kept after an answer
_GRACE = 1  # seconds that replies may take to end when the server stops


class Protocol(H11Protocol):  # type: ignore[misc]  # uvicorn is not typed here
    """uvicorn's connection, with these limits."""

    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel(self._head, self._write)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel(self._write)
        self._write = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel(self._write)
        super().resume_writing()

    def _await_request(self) -> None:
        self._cancel(self._head)
        self._head = self.loop.call_later(HEAD_SECONDS, self._abort_unless_busy)

    def _abort_unless_busy(self) -> None:
        # also ends connections that are closed but whose client does not take the last bytes
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    @staticmethod
    def _cancel(*timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()


class _Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn's server, which says when it is asked to end."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], Any]) -> None:
        super().__init__(config)
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._ending()
        super().handle_exit(sig, frame)


def serve(
    app: App,
    sock: socket.socket,
    log_level: str = "warning",
    *,
    ending: Callable[[], Any] = lambda: None,
) -> None:
    """Answer requests until SIGINT or SIGTERM. The signal ends the process, after the answers.

    Args:
        app: the application.
        sock: the bound socket.
        log_level: of uvicorn.
        ending: called when the signal comes; replies should end.
    """
    config = uvicorn.Config(
        app,
        log_level=log_level,
        access_log=log_level == "info",
        lifespan="off",
        http=Protocol,
        ws="none",
        proxy_headers=False,  # nobody is trusted to name another client
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
    )
    try:
        _Server(config, ending).run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn raises it at its end
        # Python would clean up a large model for seconds, and abort if a thread is inside torch at that time.
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
