"""The text of replies: stop strings and decoding, alone and through a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import MODEL, PROMPT, Server, serving

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from isqtorch.app.server.replies import Decoder, StopText


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


# ---- alone -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "found"),
    [
        ([], ["any", "thing"], "anything", False),
        (["stop"], ["we ", "st", "op", " here"], "we ", True),
        (["stop"], ["we st", "and"], "we stand", False),
        (["stop"], ["we sto"], "we sto", False),  # what is held back comes at the end
        (["aab"], ["aa", "ab"], "a", True),  # a beginning inside a beginning
        (["b", "ab"], ["xa", "b"], "x", True),  # the one that begins first
        (["xyz", "yz"], ["wx", "y", "z"], "w", True),
        (["\n"], ["\n"], "", True),
        (["é"], ["cafe", "\u0301 café"], "cafe\u0301 caf", True),
        (["x" * 1000], ["x" * 999, "y"], "x" * 999 + "y", False),
    ],
)
def test_text_ends_before_a_stop_string(stops: list[str], pieces: list[str], text: str, found: bool) -> None:
    stop = StopText(stops)
    passed = [stop.feed(piece) for piece in pieces]
    assert "".join(passed) + stop.rest() == text
    assert stop.found == found
    assert not any(end in "".join(passed) for end in stops)  # never on its way to the client


@pytest.mark.parametrize("stop", ["stop", "aab", "abab", "aaaa"])
def test_how_text_is_cut_into_pieces_does_not_matter(stop: str) -> None:
    text = "xaaxabaxaaaabxababxstop"
    expected = text[: text.index(stop)] if stop in text else text
    for size in range(1, len(text)):
        cut = StopText([stop])
        pieces = [cut.feed(text[start : start + size]) for start in range(0, len(text), size)]
        assert "".join(pieces) + cut.rest() == expected


@pytest.mark.parametrize("text", ["def f(x):\n    return x", " leading space", "naïve café ☃ 😀", "😀" * 20])
def test_decoding_one_token_at_a_time(text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = tokenizer(text)["input_ids"]
    decoder = Decoder(tokenizer, skip_special_tokens=True)
    parts = [decoder.step(token) for token in tokens]
    assert "".join(parts) + decoder.rest() == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in part for part in parts)


def test_bytes_that_are_no_text_come_out_in_the_end() -> None:
    class Broken:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "\ufffd" * len(tokens)

    decoder = Decoder(Broken(), skip_special_tokens=True)
    assert "".join(decoder.step(1) for _ in range(100)) + decoder.rest() == "\ufffd" * 100


# ---- through a server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_reply_ends_before_the_stop_string(server: Server, path: str, streams: bool) -> None:
    chat = path.endswith("chat/completions")
    body: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}

    def ask(**more: Any) -> tuple[str, str]:
        if not streams:
            choice = server.ask(path, {**body, **more})[1]["choices"][0]
            return choice["message"]["content"] if chat else choice["text"], choice["finish_reason"]
        choices = [part["choices"][0] for part in server.streamed(path, {**body, **more})]
        texts = [choice["delta"].get("content", "") if chat else choice.get("text", "") for choice in choices]
        return "".join(texts), choices[-1]["finish_reason"]

    whole, finish = ask()
    assert finish == "length" and len(whole) > 20
    stop = whole[10:14]  # from the middle of one word to the middle of another: no token
    assert ask(stop=stop) == (whole[: whole.index(stop)], "stop")
    assert ask(stop=["never said", stop]) == (whole[: whole.index(stop)], "stop")
    assert ask(stop=[]) == ask(stop=None) == ask(stop=["never said"]) == ask(stop=["☃☃"]) == (whole, "length")


def test_a_stop_string_in_the_last_token_is_a_stop(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    text = server.ask("/v1/completions", body)[1]["choices"][0]["text"]
    body["stop"] = text[-2:]
    assert text.count(text[-2:]) == 1
    assert server.ask("/v1/completions", body)[1]["choices"][0] | {"index": 0} == {
        "text": text[:-2],
        "index": 0,
        "finish_reason": "stop",
    }
    assert server.streamed("/v1/completions", body)[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_ends_the_work_too(server: Server) -> None:
    whole = server.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 64, "temperature": 0})[1]
    stop = whole["choices"][0]["text"][8:11]
    ended = server.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 64, "temperature": 0, "stop": stop})[1]
    assert ended["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"] == 64
    assert json.dumps(stop) not in json.dumps(ended["choices"])
