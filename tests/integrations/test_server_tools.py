"""Tools by the `openai` client: the template sees them, calls are parsed, and their results go back to the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Server, chat_model, start

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\\n' }}{% endif %}{% for m in messages %}{{ m['role'] }}: "
    "{% for call in m.get('tool_calls') or [] %}call {{ call.function.name }} for {{ call.function.arguments.city }}"
    "{% endfor %}{{ m['content'] }}{{ '\\n' }}{% endfor %}assistant:"
)
# The declarative form in which transformers keeps how a model writes calls; here that of Qwen.
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant:",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*</s>", "content": "text"},
    },
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
USER = [{"role": "user", "content": "How is the weather?"}]
CALL = r'<tool_call>\{"name": "weather", "arguments": \{"city": "(Paris|Rome)"\}\}</tool_call>'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tools")
    model = chat_model(folder)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "response_template": RESPONSE}))
    running = start(folder, "--isq", "4", "-m", str(model), "--port", "0")
    yield running
    errors = running.end()
    assert "Traceback" not in errors, errors


@pytest.fixture
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def asked(calls: str, **fields: Any) -> dict[str, Any]:
    """A request; the form makes the demo model write what a model with tools would write."""
    body = {"model": "default", "messages": USER, "tools": [TOOL], "max_tokens": 200, "temperature": 0}
    return {**body, "extra_body": {"guided_regex": calls}, **fields}


def test_a_call(client: Any) -> None:
    (choice,) = client.chat.completions.create(**asked(CALL)).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_two_calls_in_a_stream_with_text_before(client: Any) -> None:
    text, calls, ends = "", {}, []
    for chunk in client.chat.completions.create(**asked(f"So: {CALL}{CALL}", stream=True)):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            calls[call.index] = (call.id, call.function.name, json.loads(call.function.arguments))
        ends += [choice.finish_reason] if choice.finish_reason else []
    assert text.strip() == "So:" and ends == ["tool_calls"]
    assert list(calls) == [0, 1] and calls[0][0] != calls[1][0]
    assert all(name == "weather" and set(arguments) == {"city"} for _, name, arguments in calls.values())


def test_the_template_sees_tools_and_their_results(server: Server) -> None:
    def rendered(messages: list[dict[str, Any]], **fields: Any) -> str:
        status, answer = server.ask("/tokenize", {"messages": messages, **fields})
        assert status == 200, answer
        text: str = server.ask("/detokenize", {"tokens": answer["tokens"]})[1]["prompt"]
        return text

    assert "The weather of a city" in rendered(USER, tools=[TOOL]) and "tools:" not in rendered(USER)
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "1", "content": "It rains."}
    text = rendered([*USER, called, result], tools=[TOOL])
    assert "call weather for Rome" in text and text.endswith("tool: It rains.\nassistant:")


def test_the_whole_turn(client: Any) -> None:
    """The client sends the message that it got, as its documentation shows, and the result of the call."""
    message = client.chat.completions.create(**asked(CALL)).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It rains."}
    (choice,) = client.chat.completions.create(**asked("It rains [a-z]+[.]", messages=[*USER, message, result])).choices
    assert choice.message.content.strip().startswith("It rains") and choice.finish_reason == "stop"
    assert choice.message.tool_calls is None


def test_tool_choice(client: Any, server: Server) -> None:
    """ "none" hides the tools from the model; a call cannot be forced, and the answer says so."""
    hidden = client.chat.completions.create(
        model="default", messages=USER, tools=[TOOL], tool_choice="none", max_tokens=4
    )
    plain = client.chat.completions.create(model="default", messages=USER, max_tokens=4)
    seen = client.chat.completions.create(
        model="default", messages=USER, tools=[TOOL], tool_choice="auto", max_tokens=4
    )
    assert hidden.usage.prompt_tokens == plain.usage.prompt_tokens < seen.usage.prompt_tokens
    for forced in ("required", {"type": "function", "function": {"name": "weather"}}):
        with pytest.raises(openai.BadRequestError, match="a call cannot be forced here"):
            client.chat.completions.create(model="default", messages=USER, tools=[TOOL], tool_choice=forced)
