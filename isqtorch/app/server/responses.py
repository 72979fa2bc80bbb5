"""/v1/responses: transformers' handler, which writes the answers and the events of a stream, with the limits of this server.

It keeps no answers: `previous_response_id` is refused.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from transformers.cli.serving.response import ResponseHandler

from . import requests
from .connection import TICKET
from .prompts import check_template, rendered
from .served import ApiError, Served
from .wishes import set_sampling, wishes_of


class Responses(ResponseHandler):  # type: ignore[misc]  # transformers is not typed
    """/v1/responses."""

    model_manager: Served

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """Read the conversation beside the event loop, then generate."""
        served = self.model_manager
        served.check_continues()
        served.check_name(body.get("model"))
        TICKET.get().wishes = wishes_of(body)
        inputs = await served.reader.async_submit(self._inputs, body)
        model, tokenizer = served.loaded.model, served.loaded.tokenizer
        config = self._build_generation_config(body, model.generation_config)
        set_sampling(config, body)
        served.admit(inputs["input_ids"].shape[-1], config)
        answer = self._streaming if body.get("stream") else self._non_streaming
        response = answer(
            request_id, model, tokenizer, served.name, body, inputs, config, served.generations, body.get("tools")
        )
        return response if body.get("stream") else await response

    def _inputs(self, body: dict[str, Any]) -> Any:
        """The tokens of the conversation; runs on the reading thread."""
        served = self.model_manager
        check_template(served, body)
        try:
            messages = self._normalize_input(body)
            body["tools"] = self._normalize_tools(body.get("tools"))
        except Exception as error:  # it reads fields of items that may be missing
            raise ApiError(400, f"input has an item that this server does not read: {error!r}") from None
        for message in messages:
            self._as_chat(message)
        requests.check_messages(messages, "input")
        return rendered(served, messages, body)

    @staticmethod
    def _as_chat(message: dict[str, Any]) -> None:
        """Name the parts of a message as a chat does."""
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
                part["type"] = "text"
            elif isinstance(part, dict) and part.get("type") == "input_image":
                part.update(
                    type="image_url", image_url={"url": part.get("image_url"), "detail": part.pop("detail", None)}
                )
