"""Generate text with a loaded model: single replies, streamed and timed, and conversations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from .model import LoadedModel


@dataclass
class Sampling:
    """Settings of a reply. None uses the model's own generation settings."""

    max_new_tokens: int = 512
    temperature: float | None = None  # 0: greedy decoding
    top_p: float | None = None
    seed: int | None = None

    def settings(self) -> dict[str, Any]:
        """Arguments for `generate`. A temperature or top_p switches sampling on."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        given = {"temperature": self.temperature, "top_p": self.top_p}
        chosen = {name: value for name, value in given.items() if value is not None}
        return {**chosen, "do_sample": True} if chosen else {}


@dataclass
class Reply:
    """A reply with its speed. The time until the first token counts as time of the prompt."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float  # until the first token
    generate_seconds: float  # for the other tokens
    finish: str  # "stop": end token; "length": limit or context reached; "interrupted": stopped by the user

    @property
    def prompt_speed(self) -> float:
        """Tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generate_speed(self) -> float:
        """Tokens per second; 0 if there was only one token."""
        later = self.generated_tokens - 1
        return later / self.generate_seconds if later > 0 and self.generate_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        speeds = {"prompt_tokens_per_second": self.prompt_speed, "tokens_per_second": self.generate_speed}
        return {**asdict(self), **{name: round(value, 2) for name, value in speeds.items()}}


class Stop:
    """A stopping criterion for `generate`: stops when `asked` is set, for example by Ctrl-C."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), self.asked, dtype=torch.bool, device=ids.device)


def generate(
    loaded: LoadedModel,
    ids: Tensor,
    sampling: Sampling,
    *,
    write: Callable[[str], Any] = lambda text: None,
    stop: Stop | None = None,
) -> Reply:
    """Continue a prompt.

    Args:
        loaded: the model.
        ids: the prompt, `[1, T]`.
        sampling: settings of the reply.
        write: called with each piece of text as soon as it is complete.
        stop: lets the caller end the reply early.

    Raises:
        ValueError: the prompt is empty or fills the context.
    """
    tokens, context, room = ids.shape[1], loaded.context, sampling.max_new_tokens
    if tokens == 0:
        raise ValueError("the prompt is empty: it has no tokens")
    if context is not None:
        if tokens >= context:
            raise ValueError(f"the prompt has {tokens} tokens; the context of the model is {context}, reply included")
        room = min(room, context - tokens)
    stop = stop or Stop()
    clock = _Clock(loaded.tokenizer, write)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    ids = ids.to(loaded.model.device)
    out = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=room,
        streamer=clock,
        stopping_criteria=[stop],
        **loaded.new_cache(),
        **sampling.settings(),
    )
    new = out[0, clock.prompt :].tolist()
    ended = new and new[-1] in _end_tokens(loaded.model)
    return Reply(
        text=loaded.tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=tokens,
        generated_tokens=len(new),
        prompt_seconds=clock.first - clock.began,
        generate_seconds=clock.last - clock.first,
        finish="stop" if ended else "interrupted" if stop.asked else "length",
    )


@dataclass
class Conversation:
    """Messages and replies, formatted by the model's chat template.

    A base model has no chat template: each message is a text to continue, and nothing is remembered.
    """

    loaded: LoadedModel
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        return bool(self.loaded.chat_writer.chat_template)

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = []

    def say(self, message: str, *, write: Callable[[str], Any] = lambda text: None, stop: Stop | None = None) -> Reply:
        """The reply to a message. An interrupted reply is remembered; a failed turn is not.

        Raises:
            ValueError: the conversation fills the context, or the template refuses it.
        """
        if not self.has_template:
            ids = self.loaded.tokenizer(message, return_tensors="pt")["input_ids"]
            return generate(self.loaded, ids, self.sampling, write=write, stop=stop)
        turn = [*self.messages, {"role": "user", "content": message}]
        reply = generate(self.loaded, self._ids(turn), self.sampling, write=write, stop=stop)
        self.messages = [*turn, {"role": "assistant", "content": reply.text}]
        return reply

    def _ids(self, messages: list[dict[str, str]]) -> Tensor:
        from jinja2 import TemplateError

        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        loaded = self.loaded
        try:
            if loaded.sees:  # the template of a processor expects lists of parts, and would leave out a plain text
                parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
                text = loaded.processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
                inputs = loaded.tokenizer(text, return_tensors="pt", **loaded.template_settings(text))
            else:
                inputs = loaded.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses: {error}") from error
        ids: Tensor = inputs["input_ids"]
        return ids


class _Clock(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """Streamer that passes text on and records the times of the tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.began = self.first = self.last = time.perf_counter()
        self.prompt = self.tokens = 0

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            self.prompt = value.shape[-1]  # of a model with an encoder: the tokens with which its decoder begins
        else:
            self.last = time.perf_counter()
            if self.tokens == 0:
                self.first = self.last
            self.tokens += 1
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.write(text)


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}
