"""transformers' handlers of OpenAI's endpoints, adapted to serve one loaded model.

transformers provides chat templates, tool calls, server-sent events, the form of the answers, and the thread that
generates. This file adds the choice of the model, limits, the sampling that the client wants, stopping when the client
is gone, and changes of the format. It overrides private methods of `transformers.cli.serving` and breaks if they
change; test_server.py notices.

One thread generates, one request after the other in the order of arrival. A change of format is queued in the same way,
so no request is lost, and every answer comes from a single model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from isqtorch.app.model import LoadedModel
from isqtorch.report.report import QuantReport

from .connection import TICKET, Ticket


class ApiError(Exception):
    """An error that is sent to the client, with its HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class GenerationError(RuntimeError):
    """Generating failed. The text has no double quotes, because transformers puts it between them in a stream."""

    def __init__(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        super().__init__(" ".join(text.split()).replace("\\", "/").replace('"', "'"))


class Served:
    """The served model, with the interface of transformers' manager of many models.

    Attributes:
        name: its id in /v1/models.
        names: all names that a request may use for it.
    """

    def __init__(self, loaded: LoadedModel, name: str) -> None:
        self.loaded, self.name = loaded, name
        self.names = {name, loaded.source, "default"}
        self.generations = _Generations(self)
        self.state = _State(self.generations)
        self.requantizing = False

    def check_name(self, name: str | None) -> None:
        """ApiError 404 if a request names another model. The name may be missing."""
        if name is not None and name not in self.names:
            raise ApiError(404, f"model {name!r} does not exist here; this server has {self.name!r}", "model_not_found")

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.LLM

    async def requantize(self, isq: str, source: str | None = None) -> QuantReport:
        """Change the format after the requests before this one are answered; later requests wait.

        Raises:
            ApiError: 400 for an unknown format, 409 during another change, 500 if the change failed. The model is
                unchanged.
        """
        try:
            self.loaded.check(isq)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        if self.requantizing:
            raise ApiError(409, "the model is changing its format already; ask again when that is done")
        self.requantizing = True
        try:
            report: QuantReport = await self.generations.async_submit(self.loaded.requantize, isq, source)
            return report
        except Exception as error:  # after any error the server continues with the present model
            raise ApiError(500, f"the format stays {self.loaded.isq}: {type(error).__name__}: {error}") from error
        finally:
            self.requantizing = False


class _State(GenerationState):  # type: ignore[misc]  # transformers is not typed
    """Returns the same queue for every model name."""

    def __init__(self, generations: GenerateManager) -> None:
        super().__init__()
        self._generations = generations

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._generations


class _Generations(GenerateManager):  # type: ignore[misc]
    """The queue: transformers' thread, with a check of each request before it is queued."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self.served = served

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **more: Any
    ) -> Any:
        self._admit(inputs, gen_config)
        return super().generate_streaming(_Turn(self.served), processor, inputs, gen_config, *args, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **more: Any
    ) -> Any:
        self._admit(inputs, gen_config)
        return await super().generate_non_streaming(_Turn(self.served), processor, inputs, gen_config, *args, **more)

    def _admit(self, inputs: Any, gen_config: Any) -> None:
        """ApiError for a prompt that is empty or too long. Limits the reply to the rest of the context."""
        tokens, context = inputs["input_ids"].shape[-1], self.served.loaded.context
        if tokens == 0:
            raise ApiError(400, "the prompt is empty: it has no tokens")
        if context is None:
            return
        if tokens >= context:
            raise ApiError(
                400,
                f"the prompt has {tokens} tokens; the context of {self.served.name!r} is {context}, reply included. Send a shorter one.",
                "context_length_exceeded",
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, context - tokens)


class _Turn:
    """Stands in for the model in one request: uses the model, the seed and the connection state when its turn comes."""

    def __init__(self, served: Served) -> None:
        self.served, self.ticket = served, TICKET.get()

    def generate(self, **inputs: Any) -> Tensor:
        """Call `generate` of the present model; runs on the generating thread."""
        if self.ticket.gone:
            raise GenerationError(ConnectionAbortedError("the client hung up"))
        if self.ticket.seed is not None:
            torch.manual_seed(self.ticket.seed)
        try:
            tokens: Tensor = self.served.loaded.model.generate(**inputs, stopping_criteria=[_Gone(self.ticket)])
            return tokens
        except Exception as error:
            raise GenerationError(error) from error


class _Gone:
    """A stopping criterion: stops when the client is gone."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), self.ticket.gone, dtype=torch.bool, device=ids.device)


# ---- the endpoints ---------------------------------------------------------------------------------------------------


class _OneModel:
    """The changes to transformers' handlers that both endpoints need."""

    model_manager: Served

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        served = self.model_manager
        served.check_name(body.get("model"))
        return served.name, served.loaded.model, served.loaded.tokenizer

    def _build_generation_config(self, body: dict[str, Any], base: Any, use_cb: bool = False) -> Any:
        """The model's own settings, overridden by the client's. A temperature or top_p switches sampling on."""
        TICKET.get().seed = body.pop("seed", None)  # set on the generating thread, when its turn comes
        config: Any = super()._build_generation_config(body, base, use_cb=use_cb)  # type: ignore[misc]
        if body.get("temperature") or ("top_p" in body and "temperature" not in body):
            config.do_sample = True
        return config


class Chat(_OneModel, ChatCompletionHandler):  # type: ignore[misc]
    """/v1/chat/completions."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        served = self.model_manager
        own = inspect.signature(served.loaded.tokenizer.apply_chat_template).parameters
        for name in body.get("chat_template_kwargs", {}):
            if name in own:  # an argument of the method itself: a template given by the client could run forever
                raise ApiError(400, f"chat_template_kwargs must not hold {name!r}")
        vocabulary = served.loaded.model.config.get_text_config().vocab_size
        outside = [token for token in body.get("logit_bias", {}) if int(token) >= vocabulary]
        if outside:
            raise ApiError(400, f"logit_bias names token {outside[0]}; the vocabulary has {vocabulary}")
        if not served.loaded.tokenizer.chat_template:
            raise ApiError(400, f"{served.name!r} is a base model without a chat template; use /v1/completions")
        return await super().handle_request(body, request_id)


class Completions(_OneModel, CompletionHandler):  # type: ignore[misc]
    """/v1/completions."""
