"""`isqtorch serve`: one server process, driven by raw requests and by the `openai` client.

Deterministic (greedy) answers tell which model gave them: the one the server started with, or the one after a change of format.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import CONTEXT, MODEL, PROMPT, ROOT, Server, chat_model, start

openai = pytest.importorskip("openai")
pytest.importorskip("transformers")
pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = chat_model(folder)
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    command = re.search(r"^isqtorch serve (.*)$", guide, re.M)  # as the guide says, but for the model and the port
    assert command is not None
    running = start(folder, *command[1].split(), "-m", str(model), "--port", "0")
    yield running
    errors = running.end()
    assert "Traceback" not in errors, errors


@pytest.fixture
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


# ---- the ordinary case -----------------------------------------------------------------------------------------------


def test_what_it_says_when_ready(server: Server) -> None:
    assert server.ready["model"] == "demo-chat" and server.ready["isq"] == "4"
    assert {layer["stored"] for layer in server.ready["report"]["layers"]} == {"q4k", "q6k"}
    assert server.address.startswith("127.0.0.1:")  # nothing else unless asked


def test_health_and_models_without_a_cache_folder(server: Server) -> None:
    assert server.ask("/health") == (200, {"status": "ok", "isq": "4", "requantizing": False})
    status, models = server.ask("/v1/models")
    assert status == 200
    assert [(m["id"], m["object"], m["context_length"]) for m in models["data"]] == [("demo-chat", "model", CONTEXT)]
    assert server.ask("/v1/models/demo-chat")[0] == 200
    assert server.ask("/v1/models/other")[0] == 404


def test_completion_is_the_models_own(server: Server) -> None:
    """The same text as `generate` of the model quantized here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import isqtorch

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
    isqtorch.quantize_(model, 4, progress=False)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert server.text(PROMPT) == tokenizer.decode(ids, skip_special_tokens=True)


def test_openai_client(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo-chat"]
    said = client.chat.completions.create(
        model="demo-chat", messages=[{"role": "user", "content": "How are files opened?"}], max_tokens=8
    )
    assert said.choices[0].finish_reason == "length" and said.usage.completion_tokens == 8
    stream = client.chat.completions.create(
        model="demo-chat", messages=[{"role": "user", "content": "How are files opened?"}], max_tokens=8, stream=True
    )
    parts = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == "length"
    text = client.completions.create(model="default", prompt=PROMPT, max_tokens=8)
    streamed = client.completions.create(model="default", prompt=PROMPT, max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == text.choices[0].text != ""


def test_openai_client_gets_the_reason(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist here; this server has 'demo-chat'"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context of 'demo-chat' is 1024"):
        client.chat.completions.create(model="default", messages=[{"role": "user", "content": "word " * 2000}])


def test_stream_ends_as_clients_expect(server: Server) -> None:
    connection = server.connect()
    connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": 4, "stream": True}))
    lines = connection.getresponse().read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all("choices" in json.loads(line.removeprefix("data: ")) for line in lines[:-2])


def test_sampling_follows_the_seed(server: Server) -> None:
    def sample(seed: int) -> str:
        body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 1.5, "seed": seed}
        return server.ask("/v1/completions", body)[1]["choices"][0]["text"]

    with ThreadPoolExecutor(4) as pool:  # at once: a seed belongs to its own request
        first, again, other, third = pool.map(sample, [1, 1, 2, 1])
    assert first == again == third != other
    assert server.text(PROMPT, 16) not in (first, other)


def test_a_reply_ends_at_the_context(server: Server) -> None:
    status, answer = server.ask("/v1/completions", {"prompt": "word " * (CONTEXT - 8), "max_tokens": 500})
    assert status == 200
    assert answer["usage"]["total_tokens"] <= CONTEXT
    assert answer["usage"]["completion_tokens"] <= 8


# ---- what clients get wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", b"{", 400, "not JSON"),
        ("/v1/completions", b"", 400, "not JSON"),
        ("/v1/completions", b"\xff\xfe", 400, "not JSON"),
        ("/v1/completions", b"[" * 100_000, 400, "not JSON"),
        ("/v1/completions", b'{"prompt": NaN}', 400, "NaN is not JSON"),
        ("/v1/completions", b"[]", 400, "must be a JSON object, got a list"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "surrogate"),
        ("/v1/completions", {}, 400, "prompt must be a string or a list of token ids"),
        ("/v1/completions", {"prompt": ""}, 400, "no tokens"),
        ("/v1/completions", {"prompt": "word " * CONTEXT}, 400, "tokens; the context of 'demo-chat' is 1024"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be a positive number"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "9"}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "x", "seed": 1 << 70}, 400, "seed"),
        ("/v1/completions", {"prompt": "x", "stop": [""]}, 400, "stop"),
        ("/v1/completions", {"prompt": "x", "n": 17}, 400, "n must be a number of replies from 1 to 16"),
        ("/v1/completions", {"prompt": "x", "generation_config": "{}"}, 400, "unknown field 'generation_config'"),
        ("/v1/completions", {"prompt": "x", "model": "y"}, 404, "'y' does not exist here"),
        ("/v1/chat/completions", {}, 400, "messages must be a list"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": ["hello"]}, 400, "messages[0]"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "must be a data URL",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            400,
            "parts of type 'text' and 'image_url'",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999": 1}},
            400,
            "the vocabulary has 4096",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "chat_template_kwargs": {"chat_template": "{% for i in range(9999) %}{% endfor %}"},
            },
            400,
            "must not hold 'chat_template'",
        ),
        ("/re_isq", {"isq": "auto"}, 400, "needs one of target_bpw"),
        ("/re_isq", {}, 400, "isq must be a format"),
        ("/re_isq", {"isq": "q4z"}, 400, "q4z"),
        ("/re_isq", {"isq": "7"}, 400, "7 bits"),
        ("/re_isq", {"isq": "q4k", "ggml_type": "x"}, 400, "unknown field 'ggml_type'"),
        ("/re_isq", {"isq": "q4k", "source": "/etc"}, 400, 'source can only be "stored"'),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/re_isq", None, 405, "Method Not Allowed"),
    ],
)
def test_a_wrong_request_is_told_why(server: Server, path: str, body: Any, status: int, message: str) -> None:
    got, answer = server.ask(path, body)
    assert got == status, answer
    assert message in answer["error"]["message"]


def test_too_large_a_body(server: Server) -> None:
    """Refused by its announced length, and, without one, when the limit is reached."""
    status, answer = server.ask("/v1/completions", b" " * (9 << 20))
    assert status == 413 and "8388608 bytes" in answer["error"]["message"]

    connection = server.connect()
    connection.request("POST", "/v1/completions", iter([b" " * (1 << 20)] * 9), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert server.ask("/health")[0] == 200


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}], ids=str)
def test_web_pages_from_elsewhere_are_refused(server: Server, headers: dict[str, str]) -> None:
    assert server.ask("/re_isq", {"isq": "q2k"}, headers)[0] == 403
    assert server.ask("/health")[1]["isq"] == "4"


# ---- hanging up, many at once, another format ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_the_slot(server: Server, stream: bool) -> None:
    """Replies of nearly a thousand tokens, abandoned at once, do not keep the next client waiting."""
    began = time.perf_counter()
    server.text(PROMPT, 100)
    of_one = time.perf_counter() - began  # seconds of 100 tokens
    for _ in range(8):
        if stream:
            server.begin(PROMPT, 1000)()
        else:
            connection = server.connect()
            connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": 1000}))
            time.sleep(0.05)
            connection.close()
    began = time.perf_counter()
    assert server.text(PROMPT, 1)
    assert time.perf_counter() - began < 20 * of_one  # 8 whole replies would take 80 times of_one


def test_32_at_once(server: Server) -> None:
    """Every client gets the answer to its own question."""
    prompts = [f"{PROMPT} {i} and" for i in range(32)]
    alone = [server.text(prompt, 6) for prompt in prompts]
    assert len(set(alone)) > 8
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(lambda prompt: server.text(prompt, 6), prompts)) == alone


def test_re_isq_under_load(server: Server) -> None:
    """No request is lost, and every answer is one model's, the old one's or the new one's."""
    old = server.text(PROMPT, 24)
    stop, answers, failures = threading.Event(), [], []

    def keep_asking() -> None:
        while not stop.is_set():
            status, answer = server.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 24})
            (answers if status == 200 else failures).append(answer)

    threads = [threading.Thread(target=keep_asking) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
        reports = []
        for isq in ("q8_0", "q2k", "q8_0"):
            time.sleep(0.3)
            reports.append(server.re_isq(isq))
        time.sleep(0.3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    new = server.text(PROMPT, 24)
    q2k_report = reports[1]
    assert q2k_report["requested"] == "q2k" and "q2k" in {layer["stored"] for layer in q2k_report["layers"]}
    assert server.ask("/health")[1]["isq"] == "q8_0"
    server.re_isq("q2k")
    q2k = server.text(PROMPT, 24)
    server.re_isq("4")
    assert server.text(PROMPT, 24) == old  # from the checkpoint: nothing of the 2-bit weights is left
    texts = {answer["choices"][0]["text"] for answer in answers}
    assert len({old, new, q2k}) == 3
    assert {old, new} <= texts <= {old, new, q2k}


def test_two_re_isq_at_once(server: Server) -> None:
    """One waits in the line, behind a long reply, and is carried out; the other is refused."""
    hang_up = server.begin(PROMPT, 1000)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, "/re_isq", {"isq": "q5k"})
        while not server.ask("/health")[1]["requantizing"]:
            time.sleep(0.01)
        status, refused = server.ask("/re_isq", {"isq": "q6k"})
        assert status == 409 and "changing its format already" in refused["error"]["message"]
        assert not first.done()
        hang_up()
        assert first.result(timeout=300)[0] == 200
    assert server.ask("/health")[1] == {"status": "ok", "isq": "q5k", "requantizing": False}
    server.re_isq("4")


# ---- starting and stopping -------------------------------------------------------------------------------------------


def test_port_in_use_is_told_before_loading(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    from isqtorch.cli import main

    port = server.address.partition(":")[2]
    assert main(["serve", "-m", str(MODEL), "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_a_quantized_checkpoint_of_a_base_model(tmp_path: Path) -> None:
    """It is served as it is, has no chat, says what a new format is made from, and ends with SIGINT."""
    from isqtorch.cli import main

    assert main(["quantize", "-m", str(MODEL), "--isq", "q4k", "-o", str(tmp_path / "packed")]) == 0
    running = start(tmp_path, "-m", str(tmp_path / "packed"), "--name", "mine", "--port", "0")
    try:
        assert running.ready["model"] == "mine" and running.ready["isq"] is None
        status, answer = running.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
        assert status == 400 and "base model without a chat template" in answer["error"]["message"]
        assert running.text(PROMPT)
        report = running.re_isq("q3k")
        assert any("made from the quantized weights" in note for note in report["notes"])
    finally:
        running.process.send_signal(signal.SIGINT)
        running.process.communicate(timeout=120)
    assert running.process.returncode in (130, -signal.SIGINT)
    with pytest.raises(OSError):
        socket.create_connection(tuple(running.address.split(":")), timeout=2)
