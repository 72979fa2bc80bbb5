"""What clients of OpenAI's API ask for, by the `openai` client where it has it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import CONTEXT, MODEL, PROMPT, Server, serving, start

openai = pytest.importorskip("openai")
pytest.importorskip("transformers")
pytest.importorskip("fastapi")

USER = [{"role": "user", "content": "How are files opened?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def complete(server: Server, **body: Any) -> dict[str, Any]:
    status, answer = server.ask("/v1/completions", {"max_tokens": 12, "temperature": 0, **body})
    assert status == 200, answer
    return answer


# ---- prompts and choices ---------------------------------------------------------------------------------------------


def test_prompts_as_lists_and_as_token_ids(server: Server) -> None:
    ids = server.ask("/tokenize", {"prompt": PROMPT})[1]["tokens"]
    other = "A list is"
    one, two = server.text(PROMPT), server.text(other)
    assert [c["text"] for c in complete(server, prompt=[PROMPT, other])["choices"]] == [one, two]
    assert complete(server, prompt=ids)["choices"][0]["text"] == one
    several = complete(server, prompt=[ids, ids])
    assert [c["text"] for c in several["choices"]] == [one, one] and [c["index"] for c in several["choices"]] == [0, 1]
    assert several["usage"] == {
        "prompt_tokens": 2 * len(ids), "completion_tokens": 24, "total_tokens": 2 * len(ids) + 24
    }  # fmt: skip


def test_several_choices(server: Server, client: Any) -> None:
    """Choice k of a seed is the one that seed + k gives."""
    sampled = {"prompt": PROMPT, "temperature": 1.3}
    three = [c["text"] for c in complete(server, n=3, seed=7, **sampled)["choices"]]
    assert len(set(three)) == 3
    assert three == [complete(server, seed=7 + k, **sampled)["choices"][0]["text"] for k in range(3)]
    assert (
        complete(server, prompt=PROMPT, n=2)["usage"]["prompt_tokens"]
        == complete(server, prompt=PROMPT)["usage"]["prompt_tokens"]
    )
    whole = client.chat.completions.create(model="default", messages=USER, n=2, seed=1, temperature=1.0, max_tokens=8)
    stream = client.chat.completions.create(
        model="default", messages=USER, n=2, seed=1, temperature=1.0, max_tokens=8, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, ends = ["", ""], {}
    *parts, last = stream
    for part in parts:
        (choice,) = part.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
        assert part.usage is None
    assert texts == [choice.message.content for choice in whole.choices] and ends == {0: "length", 1: "length"}
    assert last.choices == [] and last.usage == whole.usage and last.usage.completion_tokens == 16


# ---- log probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_chat(client: Any) -> None:
    asked = {
        "model": "default",
        "messages": USER,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    content = whole.logprobs.content
    assert len(content) == 8 and "".join(one.token for one in content) == whole.message.content
    for one in content:
        assert len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == one.logprob <= 0  # greedy: the likeliest
        assert bytes(one.bytes).decode() == one.token
    streamed = []
    for part in client.chat.completions.create(**asked, stream=True):
        if part.choices[0].logprobs is not None:
            streamed += part.choices[0].logprobs.content
    assert streamed == content
    assert client.chat.completions.create(model="default", messages=USER, max_tokens=2).choices[0].logprobs is None


def test_log_probabilities_of_a_completion(client: Any, server: Server) -> None:
    whole = client.completions.create(model="default", prompt=PROMPT, max_tokens=6, logprobs=2, temperature=0).choices[
        0
    ]
    said = whole.logprobs
    assert "".join(said.tokens) == whole.text
    assert [
        whole.text[start:].startswith(token) for start, token in zip(said.text_offset, said.tokens, strict=True)
    ] == [True] * 6
    assert all(
        len(top) == 2 and max(top.values()) == chosen
        for top, chosen in zip(said.top_logprobs, said.token_logprobs, strict=True)
    )
    assert all(sum(map(math.exp, top.values())) <= 1.0001 for top in said.top_logprobs)
    only = client.completions.create(model="default", prompt=PROMPT, max_tokens=6, logprobs=0, temperature=0).choices[0]
    assert only.logprobs.token_logprobs == said.token_logprobs and only.logprobs.top_logprobs == [{}] * 6
    stop = whole.text[4:7]
    cut = client.completions.create(
        model="default", prompt=PROMPT, max_tokens=6, logprobs=0, temperature=0, stop=stop
    ).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert all(start < len(cut.text) for start in cut.logprobs.text_offset)  # nothing of what was cut off


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_settings(server: Server) -> None:
    greedy = server.text(PROMPT)
    wild = {"prompt": PROMPT, "temperature": 5.0, "seed": 3}
    assert complete(server, **wild)["choices"][0]["text"] != greedy
    for alone in ({"top_k": 1}, {"min_p": 1.0}):  # one token is left
        assert complete(server, **wild, **alone)["choices"][0]["text"] == greedy, alone
    all_tokens = [complete(server, **wild, top_k=k)["choices"][0]["text"] for k in (0, -1)]
    assert all_tokens[0] == all_tokens[1]
    assert complete(server, **wild, n=1, top_p=1)["choices"][0]["text"] != greedy


def test_penalties(server: Server) -> None:
    """A text that repeats itself repeats itself less; each penalty does what OpenAI says."""
    said = complete(server, prompt="a a a a a a a a", max_tokens=40, logprobs=0)["choices"][0]["logprobs"]["tokens"]
    distinct = len(set(said))
    assert distinct < 30
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2}):
        other = complete(server, prompt="a a a a a a a a", max_tokens=40, logprobs=0, **penalty)["choices"][0][
            "logprobs"
        ]["tokens"]
        assert len(set(other)) > distinct, penalty
    assert complete(server, prompt=PROMPT, presence_penalty=0, frequency_penalty=0, repetition_penalty=1)["choices"][0][
        "text"
    ] == server.text(PROMPT)


# ---- forms of replies ------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_json_of_a_schema(client: Any, server: Server) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    said = client.chat.completions.create(
        model="default", messages=USER, max_tokens=100, temperature=1.0, seed=1, response_format=form, n=4
    )
    for choice in said.choices:
        assert choice.finish_reason == "stop", choice
        person = json.loads(choice.message.content)
        assert set(person) == {"name", "age"} and len(person["name"]) <= 5 and 0 <= person["age"] <= 99
    text = client.chat.completions.create(
        model="default", messages=USER, max_tokens=12, response_format={"type": "text"}
    )
    assert not text.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"guided_regex": r"[0-9]{3}-[0-9]{2}"}, r"\d{3}-\d{2}"),
        ({"guided_choice": ["yes", "no (really)", "a|b"]}, r"yes|no \(really\)|a\|b"),
        ({"guided_grammar": 'start: "x" "y"+ "z"'}, r"xy+z"),
        ({"guided_json": {"enum": [1, 22, 333]}}, r"1|22|333"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_forms(server: Server, form: dict[str, Any], expected: str) -> None:
    pytest.importorskip("llguidance")
    answer = complete(server, prompt=PROMPT, max_tokens=200, temperature=1.0, seed=5, **form)["choices"][0]
    import re

    assert re.fullmatch(expected, answer["text"].strip()), answer


@pytest.mark.parametrize(
    "form", [{"guided_regex": "("}, {"guided_grammar": "start: missing"}, {"guided_json": "{"}, {"guided_json": {"type": "nothing"}}],
    ids=str,
)  # fmt: skip
def test_a_form_that_is_wrong(server: Server, form: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    status, answer = server.ask("/v1/completions", {"prompt": PROMPT, **form})
    assert status == 400, answer


def test_forms_without_the_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from isqtorch.app.server.grammar import Form, Forms

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="needs llguidance on the server"):
        Forms(None).rule(Form("regex", "x"), None, 0)


# ---- other endpoints -------------------------------------------------------------------------------------------------


def test_responses(client: Any) -> None:
    said = client.chat.completions.create(model="default", messages=USER, max_tokens=8).choices[0].message.content
    whole = client.responses.create(model="default", input=USER[0]["content"], max_output_tokens=8)
    assert whole.output_text == said and whole.usage.output_tokens == 8
    events = list(client.responses.create(model="default", input=USER, max_output_tokens=8, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == said
    assert events[-1].type == "response.completed" and events[-1].response.output_text == said
    parts = [{"role": "user", "content": [{"type": "input_text", "text": USER[0]["content"]}]}]
    assert client.responses.create(model="default", input=parts, max_output_tokens=8).output_text == said
    told = client.responses.create(model="default", input=parts, instructions="Be brief.", max_output_tokens=8)
    assert told.usage.input_tokens > whole.usage.input_tokens


def test_tokens_there_and_back(server: Server) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT)["input_ids"]
    assert server.ask("/tokenize", {"prompt": PROMPT})[1] == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": CONTEXT,
    }
    assert server.ask("/tokenize", {"content": PROMPT})[1]["tokens"] == ids
    assert server.ask("/detokenize", {"tokens": ids})[1]["prompt"].endswith(PROMPT)
    chat = server.ask("/tokenize", {"messages": USER})[1]["tokens"]
    text = server.ask("/detokenize", {"tokens": chat})[1]["prompt"]
    assert "user: How are files opened?" in text and text.endswith("assistant:")


def test_metrics(server: Server) -> None:
    def numbers() -> dict[str, float]:
        connection = server.connect()
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
        connection.close()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = numbers()
    server.text(PROMPT, 9)
    after = numbers()
    assert after["isqtorch_generated_tokens_total"] - before["isqtorch_generated_tokens_total"] == 9
    assert after["isqtorch_requests_total"] - before["isqtorch_requests_total"] == 1
    assert after["isqtorch_first_token_seconds_count"] == after['isqtorch_first_token_seconds_bucket{le="+Inf"}'] > 0
    assert after["isqtorch_running"] == after["isqtorch_waiting"] == 0


def test_embeddings_of_a_decoder(client: Any, server: Server) -> None:
    texts = ["A list is a sequence.", "Files are opened with open."]
    both = [one.embedding for one in client.embeddings.create(model="default", input=texts).data]  # as base64
    plain = server.ask("/v1/embeddings", {"input": texts, "encoding_format": "float"})[1]
    assert plain["data"][1]["embedding"] == pytest.approx(both[1], abs=1e-6) and plain["usage"]["prompt_tokens"] > 6
    alone = client.embeddings.create(model="default", input=texts[1]).data[0].embedding
    assert alone == both[1] != both[0]
    assert torch.tensor(both).norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5) and len(alone) == 256


@pytest.mark.parametrize("pooling", [None, "pooling_mode_cls_token"])
def test_embeddings_of_an_encoder(tmp_path: Path, pooling: str | None) -> None:
    """They are the mean of the states, or what the folder says; such a model continues nothing."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = BertModel(config).eval()
    folder = tmp_path / "bert"
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps({pooling: True, "pooling_mode_mean_tokens": False}))
    running = start(tmp_path, "-m", str(folder), "--port", "0")
    try:
        status, answer = running.ask("/v1/embeddings", {"input": PROMPT})
        assert status == 200, answer
        with torch.no_grad():
            states = model(**tokenizer(PROMPT, return_tensors="pt")).last_hidden_state[0]
        expected = states.mean(0) if pooling is None else states[0]
        assert answer["data"][0]["embedding"] == pytest.approx((expected / expected.norm()).tolist(), abs=1e-4)
        status, answer = running.ask("/v1/completions", {"prompt": PROMPT})
        assert status == 400 and "does not continue texts" in answer["error"]["message"]
    finally:
        errors = running.end()
    assert "/v1/embeddings only" in errors and "Traceback" not in errors
