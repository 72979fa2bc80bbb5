"""transformers' handlers of OpenAI's endpoints, adapted to serve one loaded model.

transformers provides chat templates, the parsing of tool calls, server-sent events, and the form of the answers. This
file adds the choice of the model, limits, the sampling that the client wants, and stop strings. It overrides private
methods of `transformers.cli.serving` and breaks if they change; test_server.py notices.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat.chat_completion_message_function_tool_call import ChatCompletionMessageFunctionToolCall, Function
from starlette.responses import JSONResponse, Response
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import Modality, ReasoningText, ToolCall, build_response_parser

from .connection import TICKET, Ticket
from .served import ApiError, Finish, Served


class _OneModel:
    """The changes to transformers' handlers that both endpoints need."""

    model_manager: Served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """Read the prompt beside the event loop, then generate."""
        served = self.model_manager
        served.check_name(body.get("model"))
        inputs = await served.reader.async_submit(self._inputs, body)
        model, tokenizer = served.loaded.model, served.loaded.tokenizer
        config = self._build_generation_config(body, model.generation_config)
        served.admit(inputs["input_ids"].shape[-1], config)
        own = self._own_field(body)
        if body.get("stream"):
            response: Response = self._streaming(  # type: ignore[attr-defined]
                request_id, model, tokenizer, served.name, inputs, config, served.generations, own
            )
            return response
        parser = self._parser(model, tokenizer, inputs, own)
        parts, usage, finish = await served.generations.generate_whole(tokenizer, inputs, config, parser)
        return JSONResponse(self._answer(request_id, parts, usage, finish, own))

    def _inputs(self, body: dict[str, Any]) -> Any:
        """The tokens of the prompt; runs on the reading thread."""
        raise NotImplementedError

    def _own_field(self, body: dict[str, Any]) -> Any:
        """The field that only this endpoint has, and that its reply needs."""
        raise NotImplementedError

    def _parser(self, model: Any, tokenizer: Any, inputs: Any, own: Any) -> Any:
        """What splits a reply into its parts; None: it is all text."""
        return None

    def _answer(self, request_id: str, parts: list[Any], usage: CompletionUsage, finish: Finish, own: Any) -> Any:
        """The body of a whole reply, as JSON."""
        raise NotImplementedError

    def _build_generation_config(self, body: dict[str, Any], base: Any, use_cb: bool = False) -> Any:
        """The model's own settings, overridden by the client's. A temperature or top_p switches sampling on."""
        ticket: Ticket = TICKET.get()
        ticket.seed = body.pop("seed", None)  # set on the generating thread, when its turn comes
        stops = body.pop("stop", ())  # found in the text, see replies.py
        ticket.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        config: Any = super()._build_generation_config(body, base, use_cb=use_cb)  # type: ignore[misc]
        if body.get("temperature") or ("top_p" in body and "temperature" not in body):
            config.do_sample = True
        return config


class Chat(_OneModel, ChatCompletionHandler):  # type: ignore[misc]
    """/v1/chat/completions."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        served = self.model_manager
        own = inspect.signature(served.loaded.tokenizer.apply_chat_template).parameters
        for name in body.get("chat_template_kwargs", {}):
            # an argument of the method itself (a template given by the client could run forever), or what it passes on
            if name in own or name in ("messages", "conversations"):
                raise ApiError(400, f"chat_template_kwargs must not hold {name!r}")
        vocabulary = served.loaded.model.config.get_text_config().vocab_size
        outside = [token for token in body.get("logit_bias", {}) if int(token) >= vocabulary]
        if outside:
            raise ApiError(400, f"logit_bias names token {outside[0]}; the vocabulary has {vocabulary}")
        if not served.loaded.tokenizer.chat_template:
            raise ApiError(400, f"{served.name!r} is a base model without a chat template; use /v1/completions")
        return await super().handle_request(body, request_id)

    def _inputs(self, body: dict[str, Any]) -> Any:
        served = self.model_manager
        tokenizer = served.loaded.tokenizer
        settings = {"add_generation_prompt": True, "tools": body.get("tools"), **body.get("chat_template_kwargs", {})}
        try:
            messages = self.get_processor_inputs_from_messages(body["messages"], Modality.LLM)
            served.check_length(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
            inputs = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", **settings
            )
        except ApiError:
            raise
        except Exception as error:  # templates are programs: they can raise anything for messages they do not expect
            raise ApiError(
                400, f"the model's chat template does not take this request: {type(error).__name__}: {error}"
            ) from error
        return inputs.to(served.loaded.model.device)

    def _own_field(self, body: dict[str, Any]) -> Any:
        return body.get("tools")

    def _parser(self, model: Any, tokenizer: Any, inputs: Any, own: Any) -> Any:
        return build_response_parser(tokenizer, model, inputs["input_ids"], tools=own)

    def _answer(self, request_id: str, parts: list[Any], usage: CompletionUsage, finish: Finish, own: Any) -> Any:
        calls = [
            ChatCompletionMessageFunctionToolCall(
                id=f"{request_id}_tool_call_{i}",
                type="function",
                function=Function(name=call.name, arguments=call.arguments),
            )
            for i, call in enumerate(part for part in parts if isinstance(part, ToolCall))
        ]
        return self._build_completion(
            request_id,
            "".join(part for part in parts if type(part) is str),
            self.model_manager.name,
            finish_reason="tool_calls" if calls else finish,
            usage=usage,
            tool_calls=calls or None,
            reasoning_content="".join(part for part in parts if isinstance(part, ReasoningText)) or None,
        )


class Completions(_OneModel, CompletionHandler):  # type: ignore[misc]
    """/v1/completions."""

    def _inputs(self, body: dict[str, Any]) -> Any:
        served = self.model_manager
        served.check_length(body["prompt"])
        inputs = served.loaded.tokenizer(body["prompt"], return_tensors="pt", verbose=False)
        return inputs.to(served.loaded.model.device)

    def _own_field(self, body: dict[str, Any]) -> Any:
        return body.get("suffix")

    def _answer(self, request_id: str, parts: list[Any], usage: CompletionUsage, finish: Finish, own: Any) -> Any:
        choice = CompletionChoice(text="".join(parts) + (own or ""), index=0, logprobs=None, finish_reason=finish)
        answer = Completion(
            id=request_id,
            created=int(time.time()),
            model=self.model_manager.name,
            choices=[choice],
            object="text_completion",
            usage=usage,
        )
        return answer.model_dump(exclude_none=True)
