"""Hostile requests to `isqtorch serve`: they get a 4xx at once, and cost neither memory nor the time of others."""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import PROMPT, Server, serving

pytest.importorskip("openai")
pytest.importorskip("fastapi")

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]
NINES = b"9" * 4000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        running.text(PROMPT)
        assert running.ask(CHAT, {"messages": USER, "max_tokens": 2})[0] == 200
        yield running


def call(arguments: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}],
        "max_tokens": 2,
    }


# ---- odd values ------------------------------------------------------------------------------------------------------

WRONG = [
    (COMPLETIONS, {"prompt": "x", "stop": "a" * 20_000}, "stop must be"),
    (COMPLETIONS, {"prompt": "x", "stop": ["a"] * 17}, "stop must be"),
    (COMPLETIONS, {"prompt": "x", "stop": [None]}, "stop must be"),
    (COMPLETIONS, {"prompt": "x", "stop": {"a": 1}}, "stop must be"),
    (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop must be"),
    (COMPLETIONS, {"prompt": "x", "temperature": 1e-300}, "temperature must be 0, or a number from"),
    (COMPLETIONS, {"prompt": "x", "temperature": 5e-324}, "temperature must be"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": 1e999}', "too large"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": -Infinity}', "not JSON"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": ' + NINES + b"}", "temperature must be"),
    (COMPLETIONS, b'{"prompt": "x", "max_tokens": ' + NINES + b"}", "max_tokens must be"),
    (COMPLETIONS, b'{"prompt": "x", "top_p": ' + NINES + b"}", "top_p must be"),
    (COMPLETIONS, b'{"prompt": "x", "seed": ' + NINES + b"9" * 4000 + b"}", "4300 digits"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": True}, "max_tokens must be"),
    (COMPLETIONS, {"prompt": "x", "stream": 1}, "stream must be"),
    (COMPLETIONS, {"prompt": [["x"]]}, "prompt[0] must be a list of token ids"),
    (COMPLETIONS, {"prompt": [1, 2.5]}, "prompt must be a list of token ids"),
    (COMPLETIONS, {"prompt": [1, -1]}, "prompt must be a list of token ids"),
    (COMPLETIONS, {"prompt": [1, 99999]}, "the prompt has token 99999; the vocabulary has 4096"),
    (COMPLETIONS, {"prompt": [1] * 2000}, "context of 'demo-chat' is 1024"),
    (COMPLETIONS, {"prompt": []}, "1 to 32 texts"),
    (COMPLETIONS, {"prompt": ["x"] * 33}, "1 to 32 texts"),
    (COMPLETIONS, {"prompt": ["x"] * 32, "n": 3}, "32 prompts with n = 3"),
    (COMPLETIONS, {"prompt": "x", "n": 1 << 40}, "n must be"),
    (COMPLETIONS, {"prompt": "x", "n": True}, "n must be"),
    (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs must be a number from 0 to 20"),
    (COMPLETIONS, {"prompt": "x", "logprobs": True}, "logprobs must be a number"),
    (COMPLETIONS, {"prompt": "x", "top_k": -2}, "top_k must be"),
    (COMPLETIONS, {"prompt": "x", "top_k": 1.5}, "top_k must be"),
    (COMPLETIONS, {"prompt": "x", "min_p": 1.1}, "min_p must be"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": 2.1}, "presence_penalty must be"),
    (COMPLETIONS, {"prompt": "x", "frequency_penalty": -2.1}, "frequency_penalty must be"),
    (COMPLETIONS, {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty must be"),
    (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": 1.5}}, "stream_options must be"),
    (COMPLETIONS, {"prompt": "x", "guided_regex": "a" * 70_000}, "guided_regex must be"),
    (COMPLETIONS, {"prompt": "x", "guided_choice": ["a"] * 300}, "guided_choice must be"),
    (COMPLETIONS, {"prompt": "x", "guided_json": {"enum": ["a" * 70_000]}}, "guided_json must be"),
    (COMPLETIONS, {"prompt": "x", "guided_regex": "a", "guided_choice": ["a"]}, "one form"),
    (CHAT, {"messages": USER, "response_format": {"type": "yaml"}}, "response_format must be"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_schema"}}, "response_format must be"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "needs logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "from 0 to 20"),
    (CHAT, {"messages": USER, "logprobs": 1}, "true or false"),
    (CHAT, {"messages": USER, "tools": [{}], "tool_choice": "required"}, "tool_choice can be"),
    ("/v1/responses", {"input": []}, "input must be"),
    ("/v1/responses", {"input": [1]}, "list of objects"),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "image_url must be"),
    ("/v1/responses", {"input": "x", "previous_response_id": "y"}, "unknown field 'previous_response_id'"),
    ("/v1/responses", {"input": "x", "max_output_tokens": 0}, "max_tokens must be"),
    ("/v1/responses", {"input": "x" * 1_000_000}, "context of 'demo-chat' is 1024"),
    ("/v1/embeddings", {"input": ["x"] * 33}, "1 to 32 texts"),
    ("/v1/embeddings", {"input": ""}, "no tokens"),
    ("/v1/embeddings", {"input": "a" * 1_000_000}, "context of 'demo-chat' is 1024"),
    ("/v1/embeddings", {"input": "x", "dimensions": 4}, "dimensions is not supported"),
    ("/tokenize", {}, "give prompt"),
    ("/tokenize", {"prompt": 1}, "prompt must be"),
    ("/tokenize", {"messages": [1]}, "messages[0]"),
    ("/detokenize", {"tokens": "x"}, "tokens must be a list"),
    ("/detokenize", {"tokens": [99999]}, "the tokenizer has"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y" * 100_000}, "suffix is too long"),
    (COMPLETIONS, {"prompt": "x", "user": "y" * 100_000}, "user is too long"),
    (COMPLETIONS, {"prompt": "x", "metadata": {"y": ["z" * 100_000]}}, "metadata is too long"),
    (COMPLETIONS, {"prompt": "x", "model": "y" * 100_000}, "model must be"),
    (COMPLETIONS, {"y" * 100_000: 1}, "unknown field"),
    (COMPLETIONS, b'{"prompt": "x", "user": "\\ud800"}', "surrogate"),
    (COMPLETIONS, b'{"prompt": "x", "\\udfff": 1}', "surrogate"),
    (COMPLETIONS, b'{"prompt": "x", "metadata": ' + b'{"a":' * 90 + b"1" + b"}" * 91, "nested 91 levels"),
    (COMPLETIONS, b'{"prompt": "x", "metadata": [' + b"{}," * 60_000 + b"{}]}", "commas, colons and brackets"),
    (COMPLETIONS, {"prompt": "a" * 1_000_000}, "context of 'demo-chat' is 1024"),
    (COMPLETIONS, {"prompt": " " * 1_000_000}, "context of 'demo-chat' is 1024"),
    (CHAT, {"messages": USER * 5000}, "1 to 4096 messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 500_000}] * 3}, "context of 'demo-chat' is 1024"),
    (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0] must be"),
    (CHAT, {"messages": [{"role": "u" * 1000, "content": "x"}]}, "messages[0] must be"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, "parts of type 'text' and 'image_url'"),
    (CHAT, {"messages": [{"role": "tool", "content": "x", "tool_call_id": [1]}]}, "tool_call_id must be"),
    (CHAT, b'{"messages": [{"role": "\\ud800", "content": "x"}]}', "surrogate"),
    (CHAT, call("[" * 20_000), "nested 20000 levels"),
    (CHAT, call('{"a": NaN}'), "NaN is not JSON"),
    (CHAT, call('"text"'), "must be a JSON object"),
    (CHAT, call('{"a": "\\ud800"}'), "surrogate"),
    (CHAT, call([1]), "must be a JSON object"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "tool_calls must be a list"),
    (CHAT, {"messages": USER, "tools": {}}, "tools must be a list"),
    (CHAT, {"messages": USER, "tools": [1]}, "tools[0] must be an object"),
    (CHAT, {"messages": USER, "tools": [{}] * 200}, "up to 128 tools"),
    (CHAT, {"messages": USER, "tools": [{"a": "b" * 500_000}]}, "tools is too long"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"a": "b" * 100_000}}, "chat_template_kwargs is too long"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"messages": []}}, "must not hold 'messages'"),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"self": 1}}, "chat template does not take"),
    (CHAT, {"messages": USER, "logit_bias": {"9" * 5000: 1}}, "logit_bias must map"),
    (CHAT, {"messages": USER, "logit_bias": {"٣": 1}}, "logit_bias must map"),
    (CHAT, {"messages": USER, "logit_bias": {"1": 1e300}}, "logit_bias must map"),
    (CHAT, {"messages": USER, "logit_bias": {str(i): 1 for i in range(2000)}}, "up to 1024"),
    ("/re_isq", {"isq": "q" * 100_000}, "isq must be"),
    ("/re_isq", b'{"isq": ' + NINES + b"}", "isq must be"),
    ("/re_isq", {"isq": "q4k", "y" * 100_000: 1}, "unknown field"),
]


@pytest.mark.parametrize(
    ("path", "body", "message"), WRONG, ids=lambda value: str(value)[:40].encode("ascii", "replace").decode()
)
def test_odd_values_are_told_in_a_short_answer(server: Server, path: str, body: Any, message: str) -> None:
    began = time.monotonic()
    status, answer = server.ask(path, body)
    assert status == 400, answer
    assert message in answer["error"]["message"] and len(answer["error"]["message"]) < 1100
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"stop": []}),
        (COMPLETIONS, {"stop": ["a" * 1000] * 16}),
        (COMPLETIONS, {"temperature": 0.001}),
        (COMPLETIONS, {"top_p": 1e-300}),
        (COMPLETIONS, {"frequency_penalty": -1 + 1e-15}),
        (COMPLETIONS, {"seed": 1 - (1 << 63), "temperature": 1}),
        (COMPLETIONS, {"prompt": "\0"}),
        (COMPLETIONS, {"metadata": {"a": "b"}, "user": "c"}),
        (CHAT, {"tools": [], "logit_bias": {}, "chat_template_kwargs": {}, "stop": []}),
        (CHAT, {"logit_bias": {"5": -100, "6": 3}}),
        (CHAT, {"messages": [*USER, {"role": "assistant", "content": "", "tool_calls": []}]}),
        (CHAT, {**call('{"a": [1]}')}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
    ],
    ids=str,
)
def test_unusual_values_are_answered(server: Server, path: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "x"} if path == COMPLETIONS else {"messages": USER}
    status, answer = server.ask(path, {**body, "max_tokens": 2, **fields})
    assert status == 200, answer


# ---- memory and time -------------------------------------------------------------------------------------------------


def test_a_thousand_hostile_requests(server: Server) -> None:
    """Memory stays, nothing is a server error, and /health answers within a second or so all the time."""
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    large: list[tuple[str, Any]] = [
        (COMPLETIONS, {"prompt": "a" * 7_000_000}),
        (COMPLETIONS, {"prompt": "😀" * 600_000}),
        (COMPLETIONS, b'{"prompt": [' + b"{}," * 2_000_000 + b"0]}"),
        (COMPLETIONS, b'{"prompt": "' + b'\\"' * 3_000_000 + b'"}'),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 300_000}] * 4}),
        (COMPLETIONS, b"[" * 7_000_000),
    ]
    heavy = [
        *((COMPLETIONS, {"prompt": "x", "max_tokens": 1, "stop": [letter * 1000] * 16}) for letter in "abcdef"),
        *((COMPLETIONS, {"prompt": "x", "max_tokens": 1, "stop": letter * 20_000}) for letter in "abcdef"),
        (CHAT, {"messages": USER * 4096}),
        (CHAT, {"messages": USER, "max_tokens": 1, "tools": [{"a": "b" * 200_000}]}),
        (COMPLETIONS, {"prompt": "word " * 900, "max_tokens": 1}),
    ]
    requests = [*large * 5, *heavy * 10, *[(path, body) for path, body, _ in WRONG] * (800 // len(WRONG))]
    requests = [*requests, *[(COMPLETIONS, {"prompt": "x", "max_tokens": 1})] * (1000 - len(requests))]
    random.Random(0).shuffle(requests)
    assert len(requests) == 1000
    waits, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            began = time.monotonic()
            assert server.ask("/health")[0] == 200
            waits.append(time.monotonic() - began)
            time.sleep(0.05)

    with ThreadPoolExecutor(5) as pool:
        watching = pool.submit(watch)
        statuses = list(pool.map(lambda request: server.ask(*request)[0], requests))
        done.set()
        watching.result()
    assert set(statuses) <= {200, 400, 413, 503}
    assert statuses.count(503) < 100  # only where large bodies meet
    assert process.memory_info().rss < 1.3 * before
    assert sorted(waits)[len(waits) // 2] < 1 and max(waits) < 10  # the machine has few cores


def test_health_answers_while_a_long_prompt_is_read(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        answer = pool.submit(server.ask, COMPLETIONS, {"prompt": "a" * 7_000_000})
        waits = []
        while not answer.done():
            asked = time.monotonic()
            assert server.ask("/health")[0] == 200
            waits.append(time.monotonic() - asked)
        took = time.monotonic() - began
    assert answer.result()[0] == 400
    assert took < 5 or max(waits) < took / 2


# ---- connections -----------------------------------------------------------------------------------------------------


def closed_after(connection: socket.socket) -> tuple[float, bytes]:
    """Seconds until the server closes a connection, and what it sent."""
    began = time.monotonic()
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    connection.close()
    return time.monotonic() - began, b"".join(parts)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nHo", b""),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 200 "),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea", b" 200 "),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{", b" 408 "),
        (b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n", b" 408 "),
        (b"POST /x HTTP/1.1\r\nHost: page.example\r\nContent-Length: 99\r\n\r\n{", b" 403 "),
    ],
)
def test_half_a_request_times_out(server: Server, sent: bytes, answer: bytes) -> None:
    seconds, got = closed_after(server.send(sent))
    assert seconds < 30 and answer in got


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x00",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [\r\nConnection: close\r\n\r\n",
    ],
    ids=lambda sent: str(sent[:50]),
)
def test_what_is_no_request(server: Server, sent: bytes) -> None:
    assert b" 400 " in closed_after(server.send(sent))[1]


def test_connections_are_limited_in_number(server: Server) -> None:
    idle = [server.send(b"") for _ in range(230)]
    try:
        time.sleep(1)
        for connection in idle:
            connection.settimeout(0.01)
        refused = 0
        for connection in idle:
            try:
                refused += connection.recv(1) == b""
            except ConnectionResetError:
                refused += 1
            except TimeoutError:
                pass
        assert 30 <= refused <= 40
    finally:
        for connection in idle:
            connection.close()
    time.sleep(0.5)
    assert server.ask("/health")[0] == 200


# ---- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_replies_and_the_process(tmp_path: Path, number: int) -> None:
    with serving(tmp_path) as running:
        answers: list[tuple[int, Any]] = []
        lines: list[str] = []

        def ask() -> None:
            answers.append(running.ask(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1000}))

        def stream() -> None:
            connection = running.connect()
            body = {"prompt": PROMPT, "max_tokens": 1000, "stream": True}
            connection.request("POST", COMPLETIONS, json.dumps(body))
            lines.append(connection.getresponse().read().decode())

        threads = [threading.Thread(target=target) for target in (stream, ask, stream, ask)]
        for thread in threads:
            thread.start()
        half = [
            running.send(b"GET / HT"),
            running.send(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"),
        ]
        time.sleep(0.5)
        began = time.monotonic()
        running.process.send_signal(number)
        running.process.wait(60)
        assert time.monotonic() - began < 2.5  # 2 and what a busy machine adds
        for thread in threads:
            thread.join()
        for connection in half:
            connection.close()
    assert [status for status, _ in answers] == [503, 503]  # a reply that was cut off does not look like a whole one
    assert len(lines) == 2 and all("the server is shutting down" in text for text in lines)


def test_a_signal_during_a_change_of_format(tmp_path: Path) -> None:
    with serving(tmp_path) as running, ThreadPoolExecutor(1) as pool:
        changing = pool.submit(running.ask, "/re_isq", {"isq": "q2k"})
        time.sleep(0.1)
        running.process.send_signal(signal.SIGINT)
        running.process.wait(30)
        assert changing.exception() is not None or changing.result()[0] in (200, 503)
    assert running.process.returncode == -signal.SIGINT


def test_nothing_is_left_of_clients_that_hang_up(server: Server) -> None:
    """Requests abandoned in every state do not block the queue."""
    for _ in range(20):
        server.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{").close()
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1000}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        server.send(head + body).close()
        server.begin(PROMPT, 1000)()
    assert server.text(PROMPT, 2)
