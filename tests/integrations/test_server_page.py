"""The page at /: its headers, and what it does in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serving

pytest.importorskip("openai")
pytest.importorskip("fastapi")

KEY = "page-key-7"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), ISQTORCH_API_KEY=KEY) as running:
        yield running


def page(server: Server, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], str]:
    connection = server.connect()
    connection.request("GET", "/", headers=headers or {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def test_it_needs_no_key_and_opens_nothing_else(server: Server) -> None:
    assert page(server)[0] == 200
    assert server.ask("/v1/models")[0] == server.ask("/health")[0] == server.ask("/metrics")[0] == 401
    assert server.ask("/", {})[0] == 401  # only reading the page
    assert page(server, {"Host": "evil.example"})[0] == 403
    assert page(server, {"Origin": "http://evil.example"})[0] == 403


def test_its_policy_allows_its_own_script_only(server: Server) -> None:
    _, headers, text = page(server)
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for element in ("script", "style"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"


def test_it_is_whole_and_loads_nothing(server: Server) -> None:
    open_elements: list[str] = []
    links: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(
                name for name, _ in attrs if name in ("src", "href", "action", "style") or name.startswith("on")
            )
            if tag not in ("meta", "input"):
                open_elements.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_elements.pop() == tag

    text = page(server)[2]
    Reader().feed(text)
    assert open_elements == links == []
    assert "://" not in text and "innerHTML" not in text and "eval(" not in text


class Browser:
    """A headless Chromium that is told what to do through a pipe."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        theirs, self._to = os.pipe()
        self._from, out = os.pipe()
        options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage --remote-debugging-pipe"
        command = (
            f'exec "{CHROMIUM}" {options} --user-data-dir="{profile}" about:blank 3</dev/fd/{theirs} 4>/dev/fd/{out}'
        )
        self.process = subprocess.Popen(
            ["sh", "-c", command], pass_fds=(theirs, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(out)
        self._rest, self._number = b"", 0
        self.logged: list[str] = []
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._from, 1 << 16)
                assert part, "the browser has ended"
                self._rest += part
            raw, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(raw)
            if answer.get("method") == "Log.entryAdded":
                self.logged.append(answer["params"]["entry"]["text"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def value(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str, seconds: float = 120) -> Any:
        end = time.monotonic() + seconds
        while not (value := self.value(script)):
            assert time.monotonic() < end, (script, self.value("document.body.innerText"))
            time.sleep(0.05)
        return value

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self._to)
        os.close(self._from)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_conversation_in_a_browser(server: Server, tmp_path: Path) -> None:
    browser = Browser(tmp_path)
    try:
        browser.call("Page.navigate", url=f"{server.url}/")
        browser.wait(
            "document.querySelector('.error') && document.querySelector('.error').textContent.includes('API key')"
        )
        send = "document.getElementById('text').value = {}; document.getElementById('send').click(); 1"
        browser.value(
            f"document.getElementById('key').value = {KEY!r}; document.getElementById('tokens').value = 12; 1"
        )
        browser.value("document.getElementById('temperature').value = 0; document.getElementById('clear').click(); 1")
        hostile = "<img src=x onerror='window.hit=1'> hello"
        browser.value(send.format(json.dumps(hostile)))
        said = browser.wait(
            "!document.getElementById('send').disabled && [...document.querySelectorAll('.said')].map((box) => box.textContent)"
        )
        body = {"messages": [{"role": "user", "content": hostile}], "max_tokens": 12, "temperature": 0}
        answer = server.ask("/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})[1]
        assert said == [hostile, answer["choices"][0]["message"]["content"]]
        assert browser.value("document.getElementById('title').textContent") == "demo-chat (4)"
        assert browser.value("document.images.length + (window.hit || 0)") == 0
        assert not [line for line in browser.logged if "Content Security Policy" in line]
        browser.value(
            "const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s); 1"
        )
        assert browser.value("window.hit || 0") == 0  # a script that is not the page's own
    finally:
        browser.close()
