"""The limits of connections in `isqtorch serve` that take long or many clients to reach, with smaller numbers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from isqtorch.app.server import Reach, connection, transport  # noqa: E402  # needs the packages above
from isqtorch.app.server.connection import Connection  # noqa: E402
from isqtorch.app.server.worker import Worker  # noqa: E402


@pytest.fixture
def reach() -> Iterator[Reach]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield Reach(sock, "127.0.0.1")


def scope(method: str = "POST", **headers: str) -> dict[str, Any]:
    named = {"host": "localhost", **headers}
    headers = [(k.encode(), v.encode()) for k, v in named.items()]
    return {"type": "http", "method": method, "path": "/v1/chat/completions", "headers": headers}


class Client:
    """Sends the parts of a body, then stays; keeps the answer."""

    def __init__(self, *parts: bytes, whole: bool = True, pause: float = 0) -> None:
        self.parts, self.whole, self.pause = list(parts), whole, pause
        self.status, self.answer = 0, b""

    async def receive(self) -> dict[str, Any]:
        if not self.parts:
            await asyncio.Event().wait()
        await asyncio.sleep(self.pause)
        part = self.parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self.parts) or not self.whole}

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.answer += message.get("body", b"")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def ask(app: Connection, client: Client, **headers: str) -> int:
    await app(scope(**headers), client.receive, client.send)
    return client.status


# ---- bodies ----------------------------------------------------------------------------------------------------------


def test_a_body_in_parts(reach: Reach) -> None:
    client = Client(b"a", b"", b"bc")
    assert asyncio.run(ask(Connection(echo, reach), client)) == 200 and client.answer == b"abc"


@pytest.mark.parametrize("parts", [[b"a"], [b"a", b"b"], [b""]])
def test_a_body_that_stops(reach: Reach, parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PAUSE_SECONDS", 0.1)
    client = Client(*parts, whole=False)
    assert asyncio.run(asyncio.wait_for(ask(Connection(echo, reach), client), 5)) == 408
    assert b"not sent in time" in client.answer


def test_a_body_that_drips(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.5)
    assert asyncio.run(asyncio.wait_for(ask(Connection(echo, reach), Client(*[b"a"] * 1000, pause=0.02)), 5)) == 408


def test_bodies_together_are_limited(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not fit beside those under way is refused; their memory is free again after the answer."""
    monkeypatch.setattr(connection, "MAX_HELD_BYTES", 1000)
    go = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await echo(scope, receive, send)

    async def all_of_them() -> None:
        app = Connection(wait, reach)
        first = asyncio.create_task(ask(app, Client(b"a" * 600)))
        await asyncio.sleep(0.05)
        refused = Client(b"b" * 300, b"b" * 300)
        assert await ask(app, refused) == 503 and b"memory for bodies" in refused.answer
        second = asyncio.create_task(ask(app, Client(b"c" * 400)))
        await asyncio.sleep(0.05)
        go.set()
        assert await first == await second == 200
        assert await ask(app, Client(b"d" * 1000)) == 200

    asyncio.run(all_of_them())


def test_requests_that_wait_are_limited(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_REQUESTS", 2)
    go = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            await go.wait()
        await echo(scope, receive, send)

    async def all_of_them() -> None:
        app = Connection(wait, reach)
        waiting = [asyncio.create_task(ask(app, Client(b""))) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused, health = Client(b""), Client(b"")
        assert await ask(app, refused) == 503 and b"waiting already" in refused.answer
        await app(scope("GET"), health.receive, health.send)
        assert health.status == 200  # questions that cost nothing are answered
        go.set()
        assert [await task for task in waiting] == [200, 200]
        assert await ask(app, Client(b"")) == 200

    asyncio.run(all_of_them())


@pytest.mark.parametrize("length", ["9" * 19, "9" * 5000, "²", "-1", "x", ""])
def test_a_length_that_is_none(reach: Reach, length: str) -> None:
    assert asyncio.run(ask(Connection(echo, reach), Client(b"a"), **{"content-length": length})) in (200, 413)


def test_a_cancelled_request_is_answered(reach: Reach) -> None:
    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def cancelled() -> Client:
        client = Client(b"")
        task = asyncio.create_task(ask(Connection(wait, reach), client))
        await asyncio.sleep(0.05)
        task.cancel()
        await task
        return client

    client = asyncio.run(cancelled())
    assert client.status == 503 and json.loads(client.answer)["error"]["message"] == "the server is shutting down"


# ---- connections -----------------------------------------------------------------------------------------------------


async def flood(scope: Any, receive: Any, send: Any) -> None:
    """An answer of 64 MB, more than the system buffers for a client that does not read."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(64):
        await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def running(app: Any) -> Iterator[tuple[Any, tuple[str, int]]]:
    """uvicorn with our connections, in a thread."""
    config = uvicorn.Config(app, log_level="error", lifespan="off", http=transport.Protocol, ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server, address
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def open_connections(server: Any) -> int:
    return len(server.server_state.connections)


def soon(condition: Any, seconds: float = 10) -> bool:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET"])
def test_a_connection_without_a_request_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HEAD_SECONDS", 0.3)
    with running(echo) as (server, address), socket.create_connection(address) as client:
        client.sendall(sent)
        assert soon(lambda: open_connections(server) == 1)
        assert soon(lambda: open_connections(server) == 0)


def test_a_long_answer_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HEAD_SECONDS", 0.1)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.6)
        await echo(scope, receive, send)

    with running(slow) as (_, address), socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "WRITE_SECONDS", 0.3)
    with running(flood) as (server, address), socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert soon(lambda: open_connections(server) == 1)
        assert soon(lambda: open_connections(server) == 0)


def test_a_client_that_reads_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "WRITE_SECONDS", 2)
    with running(flood) as (_, address), socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        size = 0
        while part := client.recv(1 << 20):
            size += len(part)
            time.sleep(0.01)
        assert size > 64 << 20


def test_connections_beyond_the_limit_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_CONNECTIONS", 3)
    with running(echo) as (server, address):
        clients = [socket.create_connection(address) for _ in range(6)]
        assert soon(lambda: open_connections(server) == 3)
        for client in clients:
            client.close()
        assert soon(lambda: open_connections(server) == 0)
        with socket.create_connection(address) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")


# ---- the thread ------------------------------------------------------------------------------------------------------


def test_a_worker_survives_errors_and_clients_that_are_gone() -> None:
    worker, go = Worker("test"), threading.Event()

    async def cancelled() -> None:
        running = worker.async_submit(go.wait)
        waiting = worker.async_submit(pytest.fail, "ran for a client that is gone")
        await asyncio.sleep(0.05)
        running.cancel()
        waiting.cancel()

    asyncio.run(cancelled())
    failing: Future[Any] = worker.submit(int, "x")
    go.set()
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(10)
    assert worker.submit(int, "7").result(10) == 7
