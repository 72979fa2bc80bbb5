"""What the tests of `isqtorch serve` share: a server process with the demo model, and one request at a time."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/demo_model/model"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PROMPT = "The function returns"
CONTEXT = 1024  # of the demo model


class Server:
    """A running server: its URL, and what it printed when it was ready."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any]) -> None:
        self.process, self.ready, self.url = process, ready, ready["url"]
        self.address = self.url.removeprefix("http://")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=300)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer; `body` is sent as it is if it is bytes, and as JSON otherwise."""
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, headers or {})
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
        connection.close()
        return status, json.loads(text)

    def send(self, data: bytes) -> socket.socket:
        """A connection on which these bytes were sent, whether they are a request or not."""
        host, _, port = self.address.rpartition(":")
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=60)
        connection.sendall(data)
        return connection

    def text(self, prompt: str, tokens: int = 12) -> str:
        status, answer = self.ask("/v1/completions", {"prompt": prompt, "max_tokens": tokens})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def streamed(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The parts of a streamed answer."""
        connection = self.connect()
        connection.request("POST", path, json.dumps({**body, "stream": True}))
        lines = connection.getresponse().read().decode().split("\n\n")
        connection.close()
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def begin(self, prompt: str, tokens: int) -> Callable[[], None]:
        """Ask for a stream and wait until it begins; the result hangs up."""
        connection = self.connect()
        body = {"prompt": prompt, "max_tokens": tokens, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200 and answer.readline().startswith(b"data: ")

        def hang_up() -> None:
            answer.close()
            connection.close()

        return hang_up

    def re_isq(self, isq: str) -> dict[str, Any]:
        status, report = self.ask("/re_isq", {"isq": isq})
        assert status == 200, report
        return report

    def end(self) -> str:
        """End the server; all that it wrote since it was ready."""
        if self.process.poll() is None:
            self.process.terminate()
        return "\n".join(self.process.communicate(timeout=120))


def start(folder: Path, *options: str, **environment: str) -> Server:
    """A server process that finds no cache of models. `folder` is empty."""
    offline = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "no-cache"), "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **offline, **environment}
    command = [sys.executable, "-m", "isqtorch", "serve", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return Server(process, json.loads(line))


def chat_model(folder: Path) -> Path:
    """The demo model with a chat template."""
    model = folder / "demo-chat"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """A server with chat and 4 bits, which must end without a traceback."""
    running = start(folder, "--isq", "4", "-m", str(chat_model(folder)), "--port", "0", *options, **environment)
    try:
        yield running
    finally:
        errors = running.end()
    assert "Traceback" not in errors, errors
